"""What a batch brings besides images: named fields, each read by its own small reader in the loader's thread.

B images of a micro-batch on this rank, P labels an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mlcd_ds.data.label_store import LabelStore
from mlcd_ds.data.shard_index import ShardIndex


class DataField(Protocol):
    """A reader of one field."""

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of what it reads, by role: a run goes on with the same ones only."""

    def read(self, shards_B: np.ndarray, rows_B: np.ndarray) -> np.ndarray:
        """[B, ...] of the samples in these rows of these shards. Called by one thread."""


@dataclass(frozen=True)
class Labels:
    """int64 [B, P]: the nearest centres of each image, -1 for none."""

    store: LabelStore

    @property
    def inputs(self) -> dict[str, str]:
        manifest = self.store.manifest
        return {"labels": manifest.fingerprint, "clusters": manifest.inputs["clusters"]}

    def read(self, shards_B: np.ndarray, rows_B: np.ndarray) -> np.ndarray:
        rows = [self.store.shard(int(shard))[row] for shard, row in zip(shards_B, rows_B, strict=True)]
        return np.stack(rows).astype(np.int64)


@dataclass(frozen=True)
class TrainingData:
    """The images of a run, and the fields that its objective asks for, by name."""

    index: ShardIndex
    fields: Mapping[str, DataField]

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
