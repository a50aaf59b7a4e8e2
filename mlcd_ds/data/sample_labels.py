"""Class numbers of labelled shards, from the samples' .json members."""

from __future__ import annotations

import numpy as np

from mlcd_ds.artefacts.readers import parse_json
from mlcd_ds.data.shard_index import ShardIndex, ShardReader
from mlcd_ds.errors import UserError

FIX = "Mend the shard and index it again."
MAX_CLASSES = 1_000_000  # a larger number is an id, not a class


def shard_labels(index: ShardIndex, shard: int, key: str) -> np.ndarray:
    """int64 [n]: the label of each sample of a shard, -1 where there is none."""
    samples, reader = index.samples(shard), ShardReader(index)
    labels_N = np.full(len(samples.keys), -1, dtype=np.int64)
    try:
        for row, sample_key in enumerate(samples.keys):
            where = f"{index.shards[shard].path}, key {sample_key}"
            text = reader.read(shard, samples.metadata, row)
            content = parse_json(text, f"{where}: its .json member", FIX) if text else {}
            if not isinstance(content, dict):
                raise UserError(f"{where}: its .json member is not a JSON object. {FIX}")
            value = content.get(key)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MAX_CLASSES:
                raise UserError(
                    f"{where}: {key!r} is {str(value)[:50]!r}, not a class number from 0 to {MAX_CLASSES - 1}. Name "
                    "another key (--label-key, in training data.knn_label_key)."
                )
            labels_N[row] = value
    finally:
        reader.close()
    return labels_N
