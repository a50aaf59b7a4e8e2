"""Manifests: what a stage read, with which parameters, and what it wrote. The contract between stages.

A stage's folder is valid when its `manifest.json` is there, and the manifest is written last: a folder without one was
interrupted. Files and manifests are written under another name, flushed to disk and renamed, so that a kill at any
moment leaves either the old file or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from mlcd_ds.errors import UserError

MANIFEST_NAME = "manifest.json"
FORMAT = 1


class Frozen(BaseModel):
    """Base of every typed model: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(Frozen):
    """One output file: its size in bytes and the SHA-256 of its content."""

    bytes: int
    sha256: str


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


ManifestType = TypeVar("ManifestType", bound=Manifest)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: BinaryIO) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def record_of(path: Path) -> FileRecord:
    """Size and checksum of a file on disk."""
    return FileRecord(bytes=path.stat().st_size, sha256=sha256_of(path))


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> FileRecord:
    """Write a file so that it is there whole or not at all.

    `write` is handed a binary file. Raises UserError naming the file when the disk is full or not writable.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        record = record_of(partial)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(
            f"{path}: cannot be written ({error.strerror}). Free the disk or choose another --out."
        ) from None
    fsync_folder(path.parent)
    return record


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> FileRecord:
    """Write JSON atomically, keys in the order given."""
    return write_atomic(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a finished stage; the last thing a stage does."""
    write_json(folder / MANIFEST_NAME, manifest.model_dump(mode="json"))


def read_manifest(folder: Path, kind: type[ManifestType], stage: str) -> ManifestType:
    """Read the manifest of an earlier stage, or say which command makes it."""
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise UserError(f"{path} is not there: run `mlcd {stage} --out {folder}` first (or to its end).")
    try:
        manifest = kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(
            f"{path} is not a manifest of `mlcd {stage}` that this version reads: {first_problem(error)}. "
            f"Make it again: `mlcd {stage} --overwrite --out {folder}`."
        ) from None
    if manifest.stage != stage or manifest.format != FORMAT:
        raise UserError(f"{path}: stage {manifest.stage!r}, format {manifest.format}; wanted {stage!r}, {FORMAT}.")
    return manifest


def first_problem(error: ValidationError) -> str:
    """The first entry of a pydantic error as `key: message`."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message} (got {problem['input']!r})" if where else message


def check_file(folder: Path, name: str, record: FileRecord, stage: str) -> Path:
    """Path of an output file after its size and checksum were compared with the manifest."""
    path = folder / name
    fix = f"Make it again: `mlcd {stage} --overwrite --out {folder}`."
    if not path.exists():
        raise UserError(f"{path} is missing, though {folder / MANIFEST_NAME} lists it. {fix}")
    if path.stat().st_size != record.bytes:
        raise UserError(f"{path} has {path.stat().st_size} bytes, its manifest says {record.bytes}. {fix}")
    if sha256_of(path) != record.sha256:
        raise UserError(f"{path}: its checksum is not that of the manifest: the file was changed or damaged. {fix}")
    return path


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
