"""Captions of an index's samples to evaluate with: one a line of a sample's .txt member."""

from __future__ import annotations

import numpy as np

from mlcd_ds.data.captions import caption_lines
from mlcd_ds.data.shard_index import ShardIndex, ShardReader
from mlcd_ds.errors import UserError


def shard_captions(index: ShardIndex, shard: int) -> tuple[list[str], np.ndarray]:
    """All captions of a shard, and int64 [number of captions]: the row of the sample that each belongs to, ascending.

    UserError for a sample without one.
    """
    samples, reader = index.samples(shard), ShardReader(index)
    captions: list[str] = []
    rows: list[int] = []
    try:
        for row, key in enumerate(samples.keys):
            found = _lines(reader.read(shard, samples.caption, row))
            if not found:
                raise UserError(
                    f"{index.shards[shard].path}, key {key} has no usable caption: retrieval needs one of every image, "
                    "a .txt member in UTF-8. Give it one, or leave it out of the shards, and index them again."
                )
            captions += found
            rows += [row] * len(found)
    finally:
        reader.close()
    return captions, np.array(rows, dtype=np.int64)


def _lines(content: bytes) -> list[str]:
    try:
        return caption_lines(content)
    except UnicodeDecodeError:
        return []
