"""Labels beside the shards: row i of `NAME.npy` holds the centres of sample i of shard NAME, nearest first.

int32 [n, P]; -1 pads samples with fewer than P labels. The shards are never rewritten.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from pydantic import Field

from mlcd_ds.artefacts.manifest import Manifest, output_array, read_manifest, remake
from mlcd_ds.data.shard_index import ShardIndex
from mlcd_ds.errors import UserError


class LabelManifest(Manifest):
    """Manifest of `mlcd assign`."""

    num_images: int = Field(ge=0)
    num_labels: int = Field(ge=1)
    num_centers: int = Field(ge=1)


def check_labels(labels_NP: np.ndarray, num_centers: int, path: Path, fix: str) -> None:
    """UserError when labels name centres that do not exist; -1 means no label."""
    if labels_NP.size and not -1 <= labels_NP.min() <= labels_NP.max() < num_centers:
        bad = labels_NP.min() if labels_NP.min() < -1 else labels_NP.max()
        raise UserError(f"{path} has label {bad}, but its manifest names {num_centers} centres. {fix}")


class LabelStore:
    """Labels of an indexed shard set; memory-mapped, each shard checked when it is first read.

    Raises UserError when the labels were made for another index, or are not what their manifest says.
    """

    def __init__(self, folder: Path, index: ShardIndex) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder, LabelManifest, "assign")
        if self.manifest.num_images != index.num_images:
            raise UserError(
                f"{folder} labels {self.manifest.num_images} images, {index.folder} indexes {index.num_images}. "
                "Run embed, cluster and assign again for this index."
            )
        if self.manifest.inputs.get("index") != index.manifest.fingerprint:
            raise UserError(
                f"{folder} was made for another index than {index.folder} (their checksums differ). "
                "Run embed, cluster and assign again for this index."
            )
        self.num_centers, self.num_labels = self.manifest.num_centers, self.manifest.num_labels
        self._index = index
        self.shard = functools.lru_cache(maxsize=256)(self._open_shard)

    def _open_shard(self, shard: int) -> np.ndarray:
        """int32 [n, P] of one shard."""
        entry = self._index.shards[shard]
        shape = (entry.num_images, self.num_labels)
        labels_NP = output_array(self.folder, self.manifest, f"{entry.name}.npy", np.int32, shape, mmap="r")
        fix = remake("assign", self.folder)
        check_labels(labels_NP, self.num_centers, self.folder / f"{entry.name}.npy", fix)
        return labels_NP

    def sizes(self) -> np.ndarray:
        """int64 [C]: how many images have each centre as their nearest."""
        return output_array(self.folder, self.manifest, "sizes.npy", np.int64, (self.num_centers,))
