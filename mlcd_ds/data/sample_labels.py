"""Class numbers of labelled shards, from the samples' .json or .cls members."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlcd_ds.artefacts.readers import parse_json
from mlcd_ds.data.shard_index import ShardIndex, ShardReader
from mlcd_ds.errors import UserError

FIX = "Mend the shard and index it again."
MAX_CLASSES = 1_000_000  # a larger number is an id, not a class


def shard_labels(index: ShardIndex, shard: int, key: str) -> np.ndarray:
    """int64 [n]: the label of each sample of a shard, -1 where there is none.

    It stands under `key` in the .json member; a sample without it may have a .cls member, which holds the number alone.
    """
    samples, reader = index.samples(shard), ShardReader(index)
    labels_N = np.full(len(samples.keys), -1, dtype=np.int64)
    try:
        for row, sample_key in enumerate(samples.keys):
            where = f"{index.shards[shard].path}, key {sample_key}"
            value = _in_json(reader.read(shard, samples.metadata, row), key, where)
            if value is not None:
                what, fix = repr(key), "Name another key (--label-key, in training data.knn_label_key)."
            else:
                value = _in_cls(reader.read(shard, samples.class_number, row))
                what, fix = "its .cls member", FIX
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MAX_CLASSES:
                raise UserError(
                    f"{where}: {what} is {str(value)[:50]!r}, not a class number from 0 to {MAX_CLASSES - 1}. {fix}"
                )
            labels_N[row] = value
    finally:
        reader.close()
    return labels_N


def _in_json(content: bytes, key: str, where: str) -> Any:
    """The value of a .json member's key; None where it has none."""
    found = parse_json(content, f"{where}: its .json member", FIX) if content else {}
    if not isinstance(found, dict):
        raise UserError(f"{where}: its .json member is not a JSON object. {FIX}")
    return found.get(key)


def _in_cls(content: bytes) -> int | str | None:
    """The number in a .cls member; what else it holds as text; None where there is no member."""
    text = content.decode("utf-8", "replace").strip()
    return int(text) if text.isdecimal() and len(text) <= len(str(MAX_CLASSES)) else text or None
