"""The samples of an episode as the model sees them now: each rank embeds its share, in the order of the shards.

N samples, n of this rank, B of a batch, P projection, E embedding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mlcd_ds.clustering.embedding_store import EmbeddingStore
from mlcd_ds.clustering.memory_rows import Share
from mlcd_ds.clustering.principal import principal_components
from mlcd_ds.data.colors import random_keys
from mlcd_ds.data.episodes import EpisodeOrder
from mlcd_ds.data.fields import Tokens, TrainingData
from mlcd_ds.data.pixels import clip_pixels
from mlcd_ds.data.whole_images import WholeImageReader
from mlcd_ds.distributed.groups import ParallelGroups
from mlcd_ds.recipes.sections import Sections

Encode = Callable[[str, Tensor], Tensor]
"""Of a tower's name and images [B, 3, S, S] or tokens [B, L]: rows [B, P]."""


class EpisodeReader:
    """Reads images, captions and an external teacher's embeddings of any episode."""

    def __init__(
        self,
        recipe: Sections,
        data: TrainingData,
        order: EpisodeOrder,
        external: EmbeddingStore | None,
        groups: ParallelGroups,
        device: torch.device,
    ) -> None:
        tokens = data.fields["tokens"]
        assert isinstance(tokens, Tokens)
        self._data, self._order, self._external = data, order, external
        self._groups, self._device = groups, device
        self._tokens = tokens.reopened()  # the loader's thread reads the other
        batch = recipe.train.micro_batch_per_rank or recipe.train.global_batch // groups.data.size
        pixels, source = clip_pixels(recipe.model.image_size), f"data.index {data.index.folder}"
        self._images = WholeImageReader(data.index, batch, pixels, device, recipe.data.num_threads, source)
        self._batch = batch
        self._first_rows = np.cumsum(data.index.counts) - data.index.counts  # of each shard, among all images

    def ids(self, number: int) -> Tensor:
        """int64 [N], ascending, with repetitions where samples are drawn with replacement; on the device."""
        return torch.from_numpy(np.sort(self._order.episode(number)[0])).to(self._device)

    def features(self, number: int, encode: Encode) -> dict[str, Tensor]:
        """Rows [n, P] of this rank's share, by tower. `encode` is called equally often, on as many samples, on every
        rank; collectives: those of `encode`, an all-gather over ranks with the same images."""
        ids_N, epochs_N = self._order.episode(number)
        order_N = np.argsort(ids_N, kind="stable")
        share = Share.of(len(ids_N), self._groups.data)
        mine = order_N[share.padded]
        ids_n, epochs_n = ids_N[mine], epochs_N[mine]
        shards_n, places_n = self._order.locate(ids_n)
        rows_n = self._data.rows(shards_n, places_n)
        keys_n = np.empty(len(mine), np.int64)  # which of several captions: the one that is trained with
        for epoch in np.unique(epochs_n):
            chosen = epochs_n == epoch
            keys_n[chosen] = random_keys(ids_n[chosen], int(epoch), self._order.seed)
        found: dict[str, list[Tensor]] = {"image": [], "text": []}
        is_quiet = not (self._groups.world.is_main and sys.stderr.isatty())
        with tqdm(total=len(mine), desc=f"episode {number}", unit="sample", leave=False, disable=is_quiet) as bar:
            for images_B3SS in self._images.batches(shards_n, rows_n):
                block = slice(len(found["image"]) * self._batch, len(found["image"]) * self._batch + len(images_B3SS))
                tokens_BL = torch.from_numpy(self._tokens.read(shards_n[block], rows_n[block], keys_n[block]))
                found["image"].append(encode("image", images_B3SS))
                found["text"].append(encode("text", tokens_BL.to(self._device)))
                bar.update(len(images_B3SS))
        joined = {name: torch.cat(blocks)[: share.count] for name, blocks in found.items()}
        if self._groups.tensor:  # all take the first one's, to the bit
            joined = {name: self._groups.tensor.all_gather(rows[None])[0] for name, rows in joined.items()}
        return joined

    def external(self, number: int, dim: int) -> Tensor | None:
        """The external teacher's rows [n, dim] of this rank's share, as principal components; None without one.
        Collectives: those of `principal_components`."""
        if self._external is None:
            return None
        ids_N = np.sort(self._order.episode(number)[0])
        share = Share.of(len(ids_N), self._groups.data)
        shards_n, places_n = self._order.locate(ids_N[share.first : share.first + share.count])
        numbers_n = self._first_rows[shards_n] + self._data.rows(shards_n, places_n)
        rows_nE = self._external.read(numbers_n).to(self._device)
        return principal_components(rows_nE, len(ids_N), dim, self._groups.data)


def open_external(folder: Path, groups: ParallelGroups) -> EmbeddingStore:
    """Collective only in that each rank compares the checksums of its part of the folder."""
    return EmbeddingStore(folder, groups.world.rank, groups.world.size)
