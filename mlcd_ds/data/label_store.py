"""Labels beside the shards: row i of `NAME.npy` holds the centres of sample i of shard NAME, nearest first.

int32 [n, P]; -1 pads samples with fewer than P labels. The shards are never rewritten.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from mlcd_ds.artefacts.manifest import Manifest, check_file, read_manifest
from mlcd_ds.data.shard_index import ShardIndex
from mlcd_ds.errors import UserError


class LabelManifest(Manifest):
    """Manifest of `mlcd assign`."""

    num_images: int
    num_labels: int
    num_centers: int


class LabelStore:
    """Labels of an indexed shard set; memory-mapped, each shard checked when it is first read.

    Raises UserError when the labels were made for another index.
    """

    def __init__(self, folder: Path, index: ShardIndex) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder, LabelManifest, "assign")
        if self.manifest.num_images != index.num_images:
            raise UserError(
                f"{folder} labels {self.manifest.num_images} images, {index.folder} indexes {index.num_images}. "
                "Run embed, cluster and assign again for this index."
            )
        if self.manifest.inputs["index"] != index.manifest.fingerprint:
            raise UserError(
                f"{folder} was made for another index than {index.folder} (their checksums differ). "
                "Run embed, cluster and assign again for this index."
            )
        self.num_centers, self.num_labels = self.manifest.num_centers, self.manifest.num_labels
        self._names = [shard.name for shard in index.shards]
        self.shard = functools.lru_cache(maxsize=256)(self._open_shard)

    def _open_shard(self, shard: int) -> np.ndarray:
        """int32 [n, P] of one shard."""
        name = f"{self._names[shard]}.npy"
        return np.load(
            check_file(self.folder, name, self.manifest.files[name], "assign"), mmap_mode="r", allow_pickle=False
        )

    def sizes(self) -> np.ndarray:
        """int64 [C]: how many images have each centre as their nearest."""
        path = check_file(self.folder, "sizes.npy", self.manifest.files["sizes.npy"], "assign")
        return np.load(path, allow_pickle=False)
