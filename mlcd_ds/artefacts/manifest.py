"""Manifests: what a stage read, with which parameters, and what it wrote. The contract between stages.

A stage's folder is valid when its `manifest.json` is there, and the manifest is written last: a folder without one was
interrupted. Files and manifests are written under another name, flushed to disk and renamed, so that a kill at any
moment leaves either the old file or the new one.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from mlcd_ds.artefacts.files import FileRecord, sha256_of, write_json
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


ManifestType = TypeVar("ManifestType", bound=Manifest)


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
