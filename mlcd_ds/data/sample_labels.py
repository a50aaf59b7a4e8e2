"""Class numbers of labelled shards, from the samples' .json members."""

from __future__ import annotations

import json

import numpy as np

from mlcd_ds.data.shard_index import ShardIndex, ShardReader
from mlcd_ds.errors import UserError


def shard_labels(index: ShardIndex, shard: int, key: str) -> np.ndarray:
    """int64 [n]: the label of each sample of a shard, -1 where there is none."""
    samples, reader = index.samples(shard), ShardReader(index)
    labels_N = np.full(len(samples.keys), -1, dtype=np.int64)
    try:
        for row, sample_key in enumerate(samples.keys):
            where = f"{index.shards[shard].path}, key {sample_key}"
            text = reader.read(shard, samples.metadata, row)
            try:
                value = json.loads(text).get(key) if text else None
            except (ValueError, AttributeError):
                raise UserError(f"{where}: its .json member is not a JSON object.") from None
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise UserError(f"{where}: {key!r} is {value!r}, not a class number. Name another --label-key.")
            labels_N[row] = value
    finally:
        reader.close()
    return labels_N
