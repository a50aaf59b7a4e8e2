"""kNN accuracy of the backbone while it trains, on a small labelled index.

The labelled images are cut into two fixed halves, drawn with seed 0: one is classified by its neighbours in the other.
Features are those that `mlcd evaluate` takes, before the projection, of whole images without noise.

N labelled images, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlcd_ds.config import Recipe
from mlcd_ds.data.dali import EvaluationDecoder, WholeImages
from mlcd_ds.data.pixels import clip_pixels
from mlcd_ds.data.sample_labels import shard_labels
from mlcd_ds.data.shard_index import ShardIndex, ShardReader
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.engine.layout import Layout
from mlcd_ds.errors import UserError
from mlcd_ds.evaluation.knn import weighted_knn

K = 20


class KnnMonitor:
    """Each rank computes features of its share, rank 0 the accuracy. Draws none of the training's random numbers."""

    def __init__(
        self, recipe: Recipe, engine: Any, batch_size: int, layout: Layout, group: Group, device: torch.device
    ) -> None:
        assert recipe.data.knn_index is not None, "the recipe was checked"
        self._engine, self._layout, self._group, self._device = engine, layout, group, device
        self._index = index = ShardIndex(recipe.data.knn_index)
        index.check_shards(group.rank, group.size)
        key = recipe.data.knn_label_key
        labels = {shard: shard_labels(index, shard, key) for shard in np.flatnonzero(index.counts).tolist()}
        self._places = [(shard, int(row)) for shard, part in labels.items() for row in np.flatnonzero(part >= 0)]
        _, classes_N = np.unique(np.concatenate([part[part >= 0] for part in labels.values()]), return_inverse=True)
        self._labels_N = torch.from_numpy(classes_N).to(device)
        if len(self._places) < 2:
            raise UserError(
                f"data.knn_index {index.folder}: {len(self._places)} samples have a label under {key!r}: name another "
                "data.knn_label_key, or leave train.knn_every out."
            )
        self._decoder = EvaluationDecoder(
            batch_size, clip_pixels(recipe.model.image_size), device, num_threads=recipe.data.num_threads
        )

    def accuracy(self) -> float | None:
        """Top-1 by K neighbours (fewer where there are fewer), on rank 0; None elsewhere, NaN for features that are
        not finite. Collectives: the engine's, and an all-gather of the features."""
        self._engine.eval()
        with torch.no_grad():
            features_nD = torch.cat([self._encode(images) for images in self._images()])
        self._engine.train()
        size, num_images = self._layout.tensor_parallel, len(self._places)
        gathered = self._group.all_gather(features_nD).view(-1, size, *features_nD.shape)
        features_ND = gathered[:, 0].flatten(0, 1)[:num_images]  # ranks of a group see the same images
        if not self._group.is_main:
            return None
        if not features_ND.isfinite().all():
            return float("nan")
        order = torch.randperm(num_images, generator=torch.Generator().manual_seed(0)).to(self._device)
        known, asked = order[: num_images // 2], order[num_images // 2 :]
        features, labels, num_classes = features_ND, self._labels_N, int(self._labels_N.max()) + 1
        k = min(K, len(known))
        return weighted_knn(features[known], labels[known], features[asked], labels[asked], num_classes, (k,))[k]

    def _encode(self, images_B3SS: Tensor) -> Tensor:
        dtype = next(self._engine.module.parameters()).dtype
        return self._engine(image=images_B3SS.to(dtype), is_projected=False)["image"].float()

    def _images(self) -> Iterator[Tensor]:
        """Batches of this rank's share. Every rank has as many: the last image is repeated where some are lacking."""
        count = -(-len(self._places) // self._layout.data_parallel)
        first = self._layout.data_rank(self._group.rank) * count
        mine = [self._places[min(number, len(self._places) - 1)] for number in range(first, first + count)]
        reader, size = ShardReader(self._index), self._decoder.batch_size
        try:
            for begin in range(0, count, size):
                self._decoder.push(self._read(reader, mine[begin : begin + size]))
                yield self._decoder.pop()
        finally:
            reader.close()

    def _read(self, reader: ShardReader, places: list[tuple[int, int]]) -> WholeImages:
        samples = [self._index.samples(shard) for shard, _ in places]
        read = [reader.read(shard, table.image, row) for (shard, row), table in zip(places, samples, strict=True)]
        sizes = np.stack([table.sizes_N2[row] for (_, row), table in zip(places, samples, strict=True)])
        origin = f"data.knn_index {self._index.folder}"
        return WholeImages(read, sizes, origin)
