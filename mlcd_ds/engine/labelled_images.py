"""The images of a small labelled index, of which a model that is being trained computes features, on all ranks.

N labelled images, n of this rank, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from mlcd_ds.config import Recipe
from mlcd_ds.data.pixels import clip_pixels
from mlcd_ds.data.sample_labels import shard_labels
from mlcd_ds.data.shard_index import ShardIndex
from mlcd_ds.data.whole_images import WholeImageReader
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.engine.layout import Layout
from mlcd_ds.errors import UserError


class LabelledImages:
    """data.knn_index: whole images without noise, dealt over the data-parallel ranks."""

    def __init__(self, recipe: Recipe, batch_size: int, layout: Layout, group: Group, device: torch.device) -> None:
        assert recipe.data.knn_index is not None, "the recipe was checked"
        self._layout, self._group = layout, group
        self.index = index = ShardIndex(recipe.data.knn_index)
        index.check_shards(group.rank, group.size)
        key = recipe.data.knn_label_key
        labels = {shard: shard_labels(index, shard, key) for shard in np.flatnonzero(index.counts).tolist()}
        self._places = [(shard, int(row)) for shard, part in labels.items() for row in np.flatnonzero(part >= 0)]
        if len(self._places) < 2:
            raise UserError(
                f"data.knn_index {index.folder}: {len(self._places)} samples have a label under {key!r}: name another "
                "data.knn_label_key, or leave train.knn_every and train.zeroshot_every out."
            )
        self.labels_N = torch.from_numpy(np.concatenate([part[part >= 0] for part in labels.values()])).to(device)
        pixels, threads = clip_pixels(recipe.model.image_size), recipe.data.num_threads
        source = f"data.knn_index {index.folder}"
        self._reader = WholeImageReader(index, batch_size, pixels, device, threads, source)

    def features(self, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """[N, D] on every rank; `encode` gives those of images [B, 3, S, S]. An all-gather, and what `encode` calls."""
        features_nD = torch.cat([encode(images_B3SS) for images_B3SS in self._images()])
        gathered = self._group.all_gather(features_nD).view(-1, self._layout.tensor_parallel, *features_nD.shape)
        return gathered[:, 0].flatten(0, 1)[: len(self._places)]  # ranks of a group see the same images

    def _images(self) -> Iterator[Tensor]:
        """Batches of this rank's share. Every rank has as many: the last image is repeated where some are lacking."""
        count = -(-len(self._places) // self._layout.data_parallel)
        first = self._layout.data_rank(self._group.rank) * count
        mine = np.minimum(np.arange(first, first + count), len(self._places) - 1)
        return self._reader.batches(*np.array(self._places)[mine].T)
