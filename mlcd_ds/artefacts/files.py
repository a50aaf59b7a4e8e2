"""Files that exist whole or not at all, and their checksums."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlcd_ds.artefacts.typed import Frozen
from mlcd_ds.errors import UserError


class FileRecord(Frozen):
    """One output file: its size in bytes and the SHA-256 of its content."""

    bytes: int
    sha256: str


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
    """Write a file so that it exists whole or not at all.

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
            f"{path}: cannot be written ({error.strerror or error}). Free the disk or choose another --out."
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


def remove_file(path: Path) -> None:
    """Remove a file, which may be gone already. UserError where that is not allowed."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be removed ({error.strerror}). Choose another --out.") from None


def seal_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of all entries but "seal": the value of "seal" in a JSON file whose checksum is recorded nowhere else."""
    rest = {key: value for key, value in content.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_array(path: Path, array: np.ndarray) -> FileRecord:
    """Write a .npy file atomically."""
    return write_atomic(path, lambda file: np.save(file, array))


def write_json(path: Path, content: Any) -> FileRecord:
    """Write JSON atomically, keys in the order given."""
    return write_atomic(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))
