"""Work that is independent for every shard: dealt over the ranks, and resumed shard by shard.

A finished shard leaves `.done/NAME.json` beside its outputs. The note carries a key made of everything the result
depends on, so notes of an earlier run with other inputs or parameters are not taken for this one's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from mlcd_ds.artefacts.files import FileRecord, remove_file, seal_of, write_json
from mlcd_ds.artefacts.readers import read_array, read_model
from mlcd_ds.artefacts.typed import Frozen
from mlcd_ds.errors import UserError
from mlcd_ds.stages.runner import Context

REDO = "Pass --overwrite to make it again."


class ShardNote(Frozen):
    """What became of one shard: its output files, and counts that the stage's manifest gathers."""

    key: str
    files: dict[str, FileRecord]
    summary: dict[str, Any] = Field(default_factory=dict)
    seal: str = ""


ShardWork = Callable[[str], tuple[dict[str, FileRecord], dict[str, Any]]]


def work_key(*parts: Any) -> str:
    """A key that changes when any part of what a result depends on changes."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def write_note(folder: Path, name: str, note: ShardNote) -> None:
    """Note that a shard is finished; the last thing that is written for it."""
    content = note.model_dump(mode="json")
    write_json(folder / ".done" / f"{name}.json", {**content, "seal": seal_of(content)})


def read_note(folder: Path, name: str, key: str) -> ShardNote | None:
    """The note of a shard that is finished and still on disk, else None. A damaged note counts as none: work is redone.

    Files are compared by size here; their readers compare the checksums.
    """
    try:
        note = read_model(folder / ".done" / f"{name}.json", ShardNote, "")
    except UserError:
        return None
    is_sound = note.key == key and note.seal == seal_of(note.model_dump(mode="json"))
    return note if is_sound and all(_has_size(folder / file, r.bytes) for file, r in note.files.items()) else None


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def read_shard(folder: Path, file: str, note: ShardNote) -> np.ndarray:
    """An array that a shard's work has left, after its checksum was compared with the note's."""
    return read_array(folder / file, REDO, record=note.files[file])


def for_each_shard(
    context: Context,
    folder: Path,
    keys: Mapping[str, str],
    work: ShardWork,
    what: str,
    redo: bool = False,
    all_notes_on_all_ranks: bool = False,
) -> dict[str, ShardNote]:
    """Run `work(name)` once for every shard that has no valid note; returns all notes on rank 0, this rank's elsewhere,
    unless all ranks ask for all.

    `keys` maps the shards' names to their work keys; `folder` is shared by all ranks. Collectives: two barriers.
    """
    if redo and context.group.is_main:
        for note_path in (folder / ".done").glob("*.json"):
            remove_file(note_path)
    context.group.barrier()
    mine = context.mine(list(keys))
    own = {}
    for name in context.progress(mine, total=len(mine), unit="shard", what=what):
        note = read_note(folder, name, keys[name])
        if note is None or not note.files:  # a shard without outputs failed: perhaps it can be read now
            files, summary = work(name)
            note = ShardNote(key=keys[name], files=files, summary=summary)
            write_note(folder, name, note)
        own[name] = note
    context.group.barrier()
    if not (context.group.is_main or all_notes_on_all_ranks):
        return own
    notes = {}
    for name, key in keys.items():
        note = read_note(folder, name, key)
        if note is None:
            path, rank = folder / ".done" / f"{name}.json", context.group.rank
            raise UserError(f"{path} is not visible to rank {rank}: --out must be a shared folder.")
        notes[name] = note
    return notes
