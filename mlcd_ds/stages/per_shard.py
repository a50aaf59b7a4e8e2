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

from pydantic import Field, ValidationError

from mlcd_ds.artefacts.files import FileRecord, write_json
from mlcd_ds.artefacts.typed import Frozen
from mlcd_ds.errors import UserError
from mlcd_ds.stages.runner import Context


class ShardNote(Frozen):
    """What became of one shard: its output files, and counts that the stage's manifest gathers."""

    key: str
    files: dict[str, FileRecord]
    summary: dict[str, Any] = Field(default_factory=dict)


ShardWork = Callable[[str], tuple[dict[str, FileRecord], dict[str, Any]]]


def work_key(*parts: Any) -> str:
    """A key that changes when any part of what a result depends on changes."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def read_note(folder: Path, name: str, key: str) -> ShardNote | None:
    """The note of a shard that is finished and still on disk, else None."""
    path = folder / ".done" / f"{name}.json"
    try:
        note = ShardNote.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None
    whole = all(
        (folder / file).exists() and (folder / file).stat().st_size == r.bytes for file, r in note.files.items()
    )
    return note if note.key == key and whole else None


def for_each_shard(
    context: Context,
    folder: Path,
    keys: Mapping[str, str],
    work: ShardWork,
    what: str,
    redo: bool = False,
) -> dict[str, ShardNote]:
    """Run `work(name)` once for every shard that has no valid note; returns all notes on rank 0, none elsewhere.

    `keys` maps the shards' names to their work keys; `folder` is shared by all ranks. Collectives: two barriers.
    """
    if redo and context.group.is_main:
        for note_path in (folder / ".done").glob("*.json"):
            note_path.unlink()
    context.group.barrier()
    mine = context.mine(list(keys))
    for name in context.progress(mine, total=len(mine), unit="shard", what=what):
        note = read_note(folder, name, keys[name])
        if note is None or not note.files:  # a shard without outputs failed: perhaps it can be read now
            files, summary = work(name)
            write_json(
                folder / ".done" / f"{name}.json",
                ShardNote(key=keys[name], files=files, summary=summary).model_dump(mode="json"),
            )
    context.group.barrier()
    if not context.group.is_main:
        return {}
    notes = {}
    for name, key in keys.items():
        note = read_note(folder, name, key)
        if note is None:
            raise UserError(f"{folder / '.done' / name}.json is not visible to rank 0: --out must be a shared folder.")
        notes[name] = note
    return notes
