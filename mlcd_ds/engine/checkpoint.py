"""Checkpoints of a run: written beside, renamed when whole, checked before they are read.

RUN/checkpoints/step_00000100/ holds DeepSpeed's state (engine/), the head by class range, the backbone's fp32 weights
for evaluation and export, and checkpoint.json, which names every file with its checksum. A kill at any moment leaves
the previous checkpoint as it was.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from safetensors.torch import save

from mlcd_ds.config import Recipe
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.distributed.deepspeed import full_fp32_parameters, load_engine, save_engine
from mlcd_ds.engine.layout import Layout
from mlcd_ds.engine.tensor_parallel import whole_weights
from mlcd_ds.engine.weights import (
    BACKBONE_NAME,
    CHECKPOINT_NAME,
    CHECKPOINTS,
    CheckpointManifest,
    checkpoint_folders,
    read_checkpoint,
)
from mlcd_ds.errors import UserError
from mlcd_ds.heads.partial_fc import PartialFCHead
from mlcd_ds.heads.state import load_head, save_head
from mlcd_ds.manifest import FileRecord, fsync_folder, library_versions, record_of, write_atomic, write_json


def git_commit() -> str | None:
    """The commit of the source tree, where it is one."""
    try:
        here = Path(__file__).resolve().parent
        command = ["git", "-C", str(here), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


class Checkpointer:
    """Saves and restores engine, head and step of one run."""

    def __init__(
        self,
        recipe: Recipe,
        layout: Layout,
        engine: Any,
        head: PartialFCHead,
        head_optimizer: Any,
        group: Group,
        inputs: dict[str, str],
    ) -> None:
        self._recipe, self._layout, self._group, self._inputs = recipe, layout, group, inputs
        self._engine, self._head, self._head_optimizer = engine, head, head_optimizer
        self._folder = recipe.train.out / CHECKPOINTS
        self._git_commit = git_commit()

    def save(self, step: int) -> Path:
        """Write the state after `step` steps, then drop the oldest checkpoints. Collective.

        Raises UserError when it cannot be written; earlier checkpoints stay.
        """
        final = self._folder / f"step_{step:08d}"
        partial = self._folder / f".{final.name}.partial"
        try:
            self._write(partial, step)
            if self._group.is_main:
                os.rename(partial, final)
                fsync_folder(self._folder)
        except (OSError, RuntimeError, UserError) as error:
            # The other ranks may wait in a collective: this rank ends, and its launcher ends them.
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"{final} cannot be written ({type(error).__name__}: {error}). If the disk is full, free it; if "
                "another rank failed, see its message. Earlier checkpoints are whole."
            ) from None
        if self._group.is_main:
            for old in checkpoint_folders(self._recipe.train.out)[: -self._recipe.train.keep_checkpoints]:
                doomed = old.with_name(f".{old.name}.partial")  # a kill while removing must not leave half of it
                os.rename(old, doomed)
                shutil.rmtree(doomed)
        self._group.barrier()
        return final

    def _write(self, partial: Path, step: int) -> None:
        """All files of a checkpoint, its manifest last. Collective."""
        if self._group.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self._group.barrier()
        save_engine(self._engine, partial)
        save_head(partial, self._head, self._head_optimizer)
        weights = whole_weights(full_fp32_parameters(self._engine), self._head.groups.tensor)
        if self._group.is_main:
            write_atomic(partial / BACKBONE_NAME, lambda file: file.write(save(weights)))
        self._group.barrier()
        records = self._records(partial)
        if self._group.is_main:
            manifest = CheckpointManifest(
                step=step,
                num_ranks=self._group.size,
                zero_stage=self._layout.zero_stage,
                tensor_parallel=self._layout.tensor_parallel,
                num_classes=self._head.classes.num_classes,
                inputs=self._inputs,
                recipe=self._recipe.model_dump(mode="json"),
                files=records,
                versions=library_versions(),
                git_commit=self._git_commit,
            )
            write_json(partial / CHECKPOINT_NAME, manifest.model_dump(mode="json"))

    def _records(self, folder: Path) -> dict[str, FileRecord]:
        """Flush and sum up all files, dealt over the ranks. Collective."""
        # All ranks go by the first one's listing: on a network file system listings may differ for a while.
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        names = self._group.gather_objects(names)[0]
        mine = {}
        for name in names[self._group.rank :: self._group.size]:
            descriptor = os.open(folder / name, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            mine[name] = record_of(folder / name)
        return {name: record for part in self._group.gather_objects(mine) for name, record in part.items()}

    def resume(self) -> int:
        """Restore the newest checkpoint; returns the number of steps done, 0 when there is none. Collective."""
        if self._group.is_main:
            for partial in self._folder.glob(".step_*.partial"):  # of a run that was killed
                shutil.rmtree(partial, ignore_errors=True)
        folders = self._group.gather_objects(checkpoint_folders(self._recipe.train.out))[0]
        if not folders:
            return 0
        folder = folders[-1]
        manifest = read_checkpoint(folder)
        self._check(folder, manifest)
        load_engine(self._engine, folder)
        load_head(folder, self._head, self._head_optimizer)
        return manifest.step

    def _check(self, folder: Path, manifest: CheckpointManifest) -> None:
        if self._layout.zero_stage != manifest.zero_stage:
            raise UserError(
                f"{folder} was saved under ZeRO {manifest.zero_stage}, the DeepSpeed config says "
                f"{self._layout.zero_stage}."
            )
        if self._layout.tensor_parallel != manifest.tensor_parallel:
            raise UserError(
                f"{folder} was saved by tensor-parallel groups of {manifest.tensor_parallel}, "
                f"tensor_parallel.autotp_size is {self._layout.tensor_parallel}."
            )
        if self._group.size != manifest.num_ranks:
            raise UserError(
                f"{folder} was saved by {manifest.num_ranks} ranks, {self._group.size} were started. Start "
                f"{manifest.num_ranks}, or choose another train.out."
            )
        for role, fingerprint in self._inputs.items():
            if manifest.inputs.get(role) != fingerprint:
                raise UserError(
                    f"{folder} was trained on other {role} than data.{role} names now: choose another train.out."
                )
        names = sorted(manifest.files)
        bad = [n for n in names[self._group.rank :: self._group.size] if not _is_whole(folder / n, manifest.files[n])]
        bad = [name for part in self._group.gather_objects(bad) for name in part]
        if bad:
            raise UserError(
                f"{folder / bad[0]} is missing or damaged. Remove {folder} to resume from an older checkpoint."
            )


def _is_whole(path: Path, record: FileRecord) -> bool:
    return path.exists() and record_of(path) == record
