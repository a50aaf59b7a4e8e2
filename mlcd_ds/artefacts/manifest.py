"""Manifests: what a stage read, with which parameters, and what it wrote. The contract between stages.

A stage's folder is valid when it holds a `manifest.json`. The manifest is written last, so a folder without one was
interrupted. Files and manifests are written under another name, flushed to disk and renamed, so that a kill at any
moment leaves either the old file or the new one.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import ConfigDict, ValidationError

from mlcd_ds.artefacts.files import FileRecord, write_json
from mlcd_ds.artefacts.readers import Shape, check_record, decoding, is_there, read_array, read_json_object
from mlcd_ds.artefacts.typed import Frozen, first_problem
from mlcd_ds.errors import UserError

MANIFEST_NAME = "manifest.json"
FORMAT = 1


class Manifest(Frozen):
    """What a stage did. Subclasses add the stage's own typed fields.

    `inputs` maps the role of an earlier stage (`index`, `embeddings`, `clusters`) to its fingerprint; `files` maps
    paths relative to the folder to their records.
    """

    stage: str
    format: int = FORMAT
    parameters: dict[str, Any]
    inputs: dict[str, str]
    files: dict[str, FileRecord]
    versions: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the stage computed (not of when, where or with which versions)."""
        content = [self.stage, self.inputs, {name: record.sha256 for name, record in sorted(self.files.items())}]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def problem(self) -> str | None:
        """What in the manifest is inconsistent, None if nothing; `read_manifest` refuses an inconsistent one."""
        return None


class AnyManifest(Manifest):
    """What all stages' manifests have in common."""

    model_config = ConfigDict(extra="ignore")


ManifestType = TypeVar("ManifestType", bound=Manifest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a finished stage; the last thing a stage does."""
    write_json(folder / MANIFEST_NAME, manifest.model_dump(mode="json"))


def remake(stage: str, folder: Path) -> str:
    """What to do about a damaged output of a stage."""
    if stage == "train":
        return f"Remove {folder / MANIFEST_NAME} and start the training again: it goes on from its newest checkpoint."
    return f"Make it again: `mlcd {stage} --overwrite --out {folder}`."


def read_manifest(folder: Path, kind: type[ManifestType], stage: str) -> ManifestType:
    """Read the manifest of an earlier stage, or say which command makes it."""
    path, fix = folder / MANIFEST_NAME, remake(stage, folder)
    if not is_there(path, fix):
        raise UserError(f"{path} is not there: run `mlcd {stage} --out {folder}` first (or to its end).")
    content = read_json_object(path, fix)
    refuse_other_stage(path, content, stage)
    try:
        manifest = kind.model_validate(content)
    except ValidationError as error:
        raise UserError(
            f"{path} is not a manifest of `mlcd {stage}` that this version reads: {first_problem(error)}. {fix}"
        ) from None
    if manifest.format != FORMAT:
        raise UserError(f"{path} has format {manifest.format}, this version reads {FORMAT}. {fix}")
    if problem := manifest.problem():
        raise UserError(f"{path}: {problem}. {fix}")
    return manifest


def refuse_other_stage(path: Path, content: dict[str, Any], stage: str) -> None:
    """UserError when a manifest was written by another stage."""
    found = content.get("stage")
    if found is not None and found != stage:
        raise UserError(f"{path} is of `mlcd {found}`, not of `mlcd {stage}`: name another folder.")


def refuse_foreign_folder(folder: Path, stage: str, key: str = "--out") -> None:
    """UserError when a stage cannot write to `folder`: it is a file, or holds the finished work of another stage."""
    fix = f"Choose another {key}."
    with decoding(folder, fix):
        is_file, is_finished = folder.exists() and not folder.is_dir(), (folder / MANIFEST_NAME).is_file()
    if is_file:
        raise UserError(f"{key} {folder} is a file, not a folder. {fix}")
    if is_finished:
        try:
            content = read_json_object(folder / MANIFEST_NAME, fix)
        except UserError:
            return  # a damaged manifest may be replaced
        refuse_other_stage(folder / MANIFEST_NAME, content, stage)


def shards_problem(
    shards: Sequence[tuple[str, int]], num_images: int, files: Mapping[str, FileRecord], endings: Sequence[str]
) -> str | None:
    """What is inconsistent in a manifest's list of shards (name, number of images) and their files NAME + ending."""
    names = Counter(name for name, _ in shards)
    if repeated := [name for name, count in names.items() if count > 1]:
        return f"it names shard {repeated[0]} twice"
    if any(count < 0 for _, count in shards) or sum(count for _, count in shards) != num_images:
        return f"its shards do not add up to the {num_images} images that it names"
    missing = [f"{name}{ending}" for name in names for ending in endings if f"{name}{ending}" not in files]
    return f"it lists no {missing[0]}" if missing else None


def output_record(folder: Path, manifest: Manifest, name: str) -> FileRecord:
    """The record of one of a stage's files."""
    if name not in manifest.files:
        raise UserError(f"{folder / MANIFEST_NAME} lists no {name}. {remake(manifest.stage, folder)}")
    return manifest.files[name]


def output_path(folder: Path, manifest: Manifest, name: str) -> Path:
    """Path of an output file after its size and checksum were compared with the manifest."""
    check_record(folder / name, output_record(folder, manifest, name), remake(manifest.stage, folder))
    return folder / name


def check_outputs(folder: Path) -> None:
    """Compare all files of a finished stage's folder with its manifest; a folder without a manifest passes."""
    path, fix = folder / MANIFEST_NAME, "Make the folder again."
    if is_there(path, fix):
        stage = str(read_json_object(path, fix).get("stage"))
        manifest = read_manifest(folder, AnyManifest, stage)
        for name in manifest.files:
            output_path(folder, manifest, name)


def output_array(
    folder: Path,
    manifest: Manifest,
    name: str,
    dtype: type,
    shape: Shape,
    mmap: Literal["r", "c"] | None = None,
) -> np.ndarray:
    """An output array after its checksum, dtype and shape (None: any size) were compared."""
    record, fix = output_record(folder, manifest, name), remake(manifest.stage, folder)
    return read_array(folder / name, fix, dtype, shape, record, mmap)


def library_versions() -> dict[str, str]:
    """Versions of this project and of the libraries whose numbers end up in the artefacts."""
    names = ("mlcd_ds", "torch", "deepspeed", "numpy", "faiss-cpu", "faiss-gpu-cu12", "nvidia-dali-cuda120")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
