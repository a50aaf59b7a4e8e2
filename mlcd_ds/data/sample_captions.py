"""Captions of an index's samples to evaluate with: one a line of a sample's .txt member."""

from __future__ import annotations

import numpy as np

from mlcd_ds.data.shard_index import ShardIndex, ShardReader
from mlcd_ds.errors import UserError


def captions_of(content: bytes) -> list[str]:
    """One caption a line, without surrounding space; empty lines are none. Bytes that are not UTF-8 show as such."""
    lines = (line.strip() for line in content.decode("utf-8-sig", "replace").splitlines())
    return [line for line in lines if line]


def shard_captions(index: ShardIndex, shard: int) -> tuple[list[str], np.ndarray]:
    """All captions of a shard, and int64 [number of captions]: the row of the sample that each belongs to, ascending.

    UserError for a sample without one.
    """
    samples, reader = index.samples(shard), ShardReader(index)
    captions: list[str] = []
    rows: list[int] = []
    try:
        for row, key in enumerate(samples.keys):
            found = captions_of(reader.read(shard, samples.caption, row))
            if not found:
                raise UserError(
                    f"{index.shards[shard].path}, key {key} has no caption: retrieval needs one (a .txt member) of "
                    "every image. Give it one, or leave it out of the shards, and index them again."
                )
            captions += found
            rows += [row] * len(found)
    finally:
        reader.close()
    return captions, np.array(rows, dtype=np.int64)
