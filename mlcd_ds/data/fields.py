"""What a batch brings besides images: named fields, each read by its own small reader in the loader's thread.

B images of a micro-batch on this rank, P labels an image, L tokens a text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mlcd_ds.data.captions import CaptionForm, caption_lines, caption_text
from mlcd_ds.data.label_store import LabelStore
from mlcd_ds.data.shard_index import ShardIndex, ShardReader
from mlcd_ds.data.tokenizers import Tokenizer


class DataField(Protocol):
    """A reader of one field."""

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of what it reads, by role: a run goes on with the same ones only."""

    def read(self, shards_B: np.ndarray, rows_B: np.ndarray, keys_B: np.ndarray) -> np.ndarray:
        """[B, ...] of the samples in these rows of these shards. Called by one thread.

        `keys_B`: a random number from 0 to 2^32 for each sample in each epoch, for what is drawn.
        """


@dataclass(frozen=True)
class Labels:
    """int64 [B, P]: the nearest centres of each image, -1 for none."""

    store: LabelStore

    @property
    def inputs(self) -> dict[str, str]:
        manifest = self.store.manifest
        return {"labels": manifest.fingerprint, "clusters": manifest.inputs["clusters"]}

    def read(self, shards_B: np.ndarray, rows_B: np.ndarray, keys_B: np.ndarray) -> np.ndarray:
        rows = [self.store.shard(int(shard))[row] for shard, row in zip(shards_B, rows_B, strict=True)]
        return np.stack(rows).astype(np.int64)


class Tokens:
    """int32 [B, L]: the caption of each image, or one of its captions, drawn anew in each epoch."""

    def __init__(self, index: ShardIndex, tokenizer: Tokenizer, context: int, form: CaptionForm) -> None:
        self.tokenizer, self._context, self._form = tokenizer, context, form
        self._index, self._reader = index, ShardReader(index)

    @property
    def inputs(self) -> dict[str, str]:
        return {"tokenizer": self.tokenizer.fingerprint}

    def reopened(self) -> Tokens:
        """The same field, to be read by another thread."""
        return Tokens(self._index, self.tokenizer, self._context, self._form)

    def read(self, shards_B: np.ndarray, rows_B: np.ndarray, keys_B: np.ndarray) -> np.ndarray:
        texts = [self._text(*place) for place in zip(shards_B, rows_B, keys_B, strict=True)]
        return self.tokenizer.encode(texts, self._context)

    def _text(self, shard: int, row: int, key: int) -> str:
        content = self._reader.read(int(shard), self._index.samples(int(shard)).caption, int(row))
        if self._form == "whole":
            return caption_text(content)
        lines = caption_lines(content)
        return lines[int(key) % len(lines)]


@dataclass(frozen=True)
class TrainingData:
    """The samples of a run, and the fields that its objective asks for, by name. Samples are all images of the index;
    with texts, only those with a usable caption."""

    index: ShardIndex
    fields: Mapping[str, DataField]

    @property
    def counts(self) -> np.ndarray:
        """int64 [number of shards]: samples of each shard."""
        return self.index.caption_counts() if self._is_captioned else self.index.counts

    @property
    def num_samples(self) -> int:
        """Of all shards."""
        return int(self.counts.sum())

    def rows(self, shards_B: np.ndarray, places_B: np.ndarray) -> np.ndarray:
        """In the index, of samples that are counted from 0 in each shard."""
        if not self._is_captioned:
            return places_B
        rows = [self.index.captioned_rows(int(s))[place] for s, place in zip(shards_B, places_B, strict=True)]
        return np.array(rows, dtype=np.int64)

    @property
    def _is_captioned(self) -> bool:
        return any(isinstance(field, Tokens) for field in self.fields.values())

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of all that the run is trained on, by role."""
        found = {"index": self.index.manifest.fingerprint}
        for field in self.fields.values():
            found |= field.inputs
        return found

    @property
    def labels(self) -> LabelStore:
        """The labels, for what was asked to have them."""
        field = self.fields["labels"]
        assert isinstance(field, Labels)
        return field.store

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of the texts; None where there are none."""
        return next((field.tokenizer for field in self.fields.values() if isinstance(field, Tokens)), None)
