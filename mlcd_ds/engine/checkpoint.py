"""Checkpoints of a run: written under another name, renamed when complete, checked before they are read.

RUN/checkpoints/step_00000100/ holds the backbone's fp32 weights (for evaluation and export, too), the optimizer's
moments, what the objective keeps, and checkpoint.json, which names every file with its checksum. Nothing in it depends
on the layout: a run with another number of ranks, ZeRO stage or size of groups can resume from it. A kill at any
moment leaves the previous checkpoint as it was.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from mlcd_ds.artefacts.files import FileRecord, fsync_folder, record_of
from mlcd_ds.artefacts.manifest import library_versions
from mlcd_ds.artefacts.readers import check_record
from mlcd_ds.config import Recipe
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.distributed.engine_state import EngineState
from mlcd_ds.distributed.groups import ParallelGroups
from mlcd_ds.engine.layout import Layout
from mlcd_ds.engine.training_state import load_training_state, save_training_state
from mlcd_ds.engine.weights import (
    CHECKPOINT_NAME,
    CHECKPOINTS,
    CheckpointManifest,
    FrozenTower,
    checkpoint_folders,
    older_checkpoint,
    read_checkpoint,
    write_checkpoint_manifest,
)
from mlcd_ds.errors import UserError
from mlcd_ds.objectives.base import Objective

logger = logging.getLogger("mlcd_ds")


def git_commit() -> str | None:
    """The commit of the source tree, where it is a git checkout."""
    try:
        here = Path(__file__).resolve().parent
        command = ["git", "-C", str(here), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


class Checkpointer:
    """Saves and restores engine, objective and step of one run."""

    def __init__(
        self,
        recipe: Recipe,
        layout: Layout,
        state: EngineState,
        objective: Objective,
        groups: ParallelGroups,
        inputs: dict[str, str],
        ds_config: dict[str, Any],
        frozen: dict[str, FrozenTower] | None = None,
    ) -> None:
        self._frozen = frozen or {}
        self._ds_config = ds_config
        self._recipe, self._layout, self._group, self._inputs = recipe, layout, groups.world, inputs
        self._state, self._objective, self._groups = state, objective, groups
        self._folder = recipe.train.out / CHECKPOINTS
        self._git_commit = git_commit()

    def save(self, step: int) -> Path:
        """Write the state after `step` steps, then drop the oldest checkpoints. Collective.

        Raises UserError when it cannot be written, or would hold values that are not finite; earlier ones stay.
        """
        self._check_finite(step)
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
            for old in self._outdated():
                doomed = old.with_name(f".{old.name}.partial")  # a kill while removing must not leave half of it
                os.rename(old, doomed)
                shutil.rmtree(doomed)
        self._group.barrier()
        return final

    def _outdated(self) -> list[Path]:
        """Checkpoints that are neither among the newest nor milestones."""
        train = self._recipe.train
        old = checkpoint_folders(train.out)[: -train.keep_checkpoints]
        every = train.milestone_every
        return [folder for folder in old if not every or int(folder.name.removeprefix("step_")) % every]

    def _check_finite(self, step: int) -> None:
        """All ranks raise the same UserError, or none does. Collective."""
        is_finite = self._state.is_finite and self._objective.is_finite
        if self._group.all_reduce_max(torch.tensor([float(not is_finite)])).item():
            raise UserError(
                f"weights or moments are not finite after step {step}: no checkpoint is written. Lower optimizer.lr; "
                "started again, the run goes on from its last checkpoint."
            )

    def _write(self, partial: Path, step: int) -> None:
        """All files of a checkpoint, its manifest last. Collective."""
        if self._group.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self._group.barrier()
        save_training_state(partial, self._state, self._group, self._groups.tensor)
        self._objective.save(partial)
        self._group.barrier()
        records = self._records(partial)
        if self._group.is_main:
            manifest = CheckpointManifest(
                step=step,
                num_ranks=self._group.size,
                zero_stage=self._layout.zero_stage,
                tensor_parallel=self._layout.tensor_parallel,
                objective=self._objective.note(),
                num_updates=self._state.num_updates,
                loss_scale=self._state.loss_scale,
                inputs=self._inputs,
                recipe=self._recipe.model_dump(mode="json"),
                deepspeed=self._ds_config,
                files=records,
                frozen=self._frozen,
                versions=library_versions(),
                git_commit=self._git_commit,
            )
            write_checkpoint_manifest(partial, manifest)

    def _records(self, folder: Path) -> dict[str, FileRecord]:
        """Flush and checksum all files, dealt over the ranks. Collective."""
        # All ranks go by the first one's listing: on a network file system listings may differ for a while.
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        names = self._group.gather_objects(names)[0]
        mine = {}
        for name in names[self._group.rank :: self._group.size]:
            descriptor = os.open(folder / name, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            with contextlib.suppress(OSError):  # some network file systems know no modes
                os.chmod(folder / name, folder.stat().st_mode & 0o666)  # safetensors leaves them to their owner alone
            mine[name] = record_of(folder / name)
        return {name: record for part in self._group.gather_objects(mine) for name, record in part.items()}

    def resume(self) -> int:
        """Restore the newest checkpoint; returns the number of steps done, 0 when there is none. Collective."""
        if self._group.is_main:
            for partial in self._folder.glob(".step_*.partial"):  # of a run that was killed
                shutil.rmtree(partial, ignore_errors=True)
            self._set_incomplete_aside()
        folders = self._group.gather_objects(checkpoint_folders(self._recipe.train.out))[0]
        if not folders:
            return 0
        folder = folders[-1]
        manifest = read_checkpoint(folder)
        self._check(folder, manifest)
        load_training_state(folder, self._state, self._groups.tensor, manifest)
        self._objective.load(folder)
        return manifest.step

    def _set_incomplete_aside(self) -> None:
        """Rename remains of checkpoints that have no checkpoint.json: they would be in the way of a save."""
        for folder in sorted(self._folder.glob("step_*")):
            if not (folder / CHECKPOINT_NAME).exists():
                aside = folder.with_name(f"incomplete_{folder.name}_{time.time_ns()}")
                try:
                    os.rename(folder, aside)
                except OSError as error:
                    raise UserError(
                        f"{folder} is incomplete and cannot be moved ({error.strerror}): remove it."
                    ) from None
                logger.warning("%s has no %s: it is set aside as %s", folder, CHECKPOINT_NAME, aside.name)

    def _check(self, folder: Path, manifest: CheckpointManifest) -> None:
        for role, fingerprint in self._inputs.items():
            if manifest.inputs.get(role, fingerprint) != fingerprint:  # earlier versions name no clusters
                raise UserError(
                    f"{folder} was trained on other {role} than data.{role} names now: choose another train.out."
                )
        if manifest.num_updates is None:
            raise UserError(
                f"{folder} was saved by an earlier version, whose optimizer state this one does not read. It can be "
                "evaluated and exported; to go on from its weights, export it, and start a new run --init-from that."
            )
        check_files(folder, manifest, list(manifest.files), self._group, self._objective.own_files)


def check_files(
    folder: Path, manifest: CheckpointManifest, names: list[str], group: Group, own_files: re.Pattern[str] | None
) -> None:
    """Compare files of a checkpoint with their checksums, dealt over the ranks. Collective; UserError names one.

    `own_files`: names of what the objective wrote.
    """
    mine = sorted(names)[group.rank :: group.size]
    bad = [name for name in mine if not _is_whole(folder / name, manifest.files[name])]
    bad = [name for part in group.gather_objects(bad) for name in part]
    if own_files:  # one that the manifest does not list would be read with the others
        present = sorted(path.name for path in folder.iterdir() if own_files.fullmatch(path.name))
        bad += [name for name in present if name not in manifest.files]
    if bad:
        raise UserError(f"{folder / bad[0]} is missing, damaged, or of another checkpoint. {older_checkpoint(folder)}")


def _is_whole(path: Path, record: FileRecord) -> bool:
    try:
        check_record(path, record, "")
    except UserError:
        return False
    return True
