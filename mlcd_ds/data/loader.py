"""Batches of images for training and evaluation: the order of samples, the tars, the fields and DALI, joined.

B images on this rank.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from mlcd_ds.artefacts.typed import Frozen
from mlcd_ds.data.colors import NUM_COLORS, random_colors, random_keys
from mlcd_ds.data.crops import random_boxes
from mlcd_ds.data.dali import EncodedBatch, EvaluationDecoder, ImageDecoder, WholeImages
from mlcd_ds.data.fields import TrainingData
from mlcd_ds.data.order import Order
from mlcd_ds.data.pixels import PixelFormat
from mlcd_ds.data.shard_index import ShardIndex, ShardReader
from mlcd_ds.distributed.collectives import Group


class AugmentConfig(Frozen):
    """Random-resized crop, flip and colours. Defaults are those of the team's public code; the paper gives none."""

    crop_area: tuple[float, float] = Field((0.7, 1.0), description="smallest and largest part of the image kept")
    crop_aspect: tuple[float, float] = Field((0.8, 1.25), description="narrowest and widest aspect ratio of the crop")
    flip: bool = Field(True, description="mirror half of the images")
    color_jitter: float = Field(0.0, ge=0, lt=1, description="brightness, contrast and saturation change by up to this")
    hue_jitter: float = Field(0.0, ge=0, le=180, description="the hue turns by up to this, degrees")

    @model_validator(mode="after")
    def _check_crops(self) -> AugmentConfig:
        for name, (least, most), limit in (("crop_area", self.crop_area, 1), ("crop_aspect", self.crop_aspect, 100)):
            if not 0 < least <= most <= limit:
                raise ValueError(
                    f"{name} is [{least}, {most}]: give the smaller number first, both above 0 and up to {limit}"
                )
        return self

    @property
    def changes_colors(self) -> bool:
        return self.color_jitter > 0 or self.hue_jitter > 0


@dataclass(frozen=True)
class Batch:
    """A micro-batch on the device: images fp32 [B, 3, S, S], fields [B, ...] by name; of each image its place among the
    run's samples, and the key of its noise, int64 [B]."""

    images_B3SS: Tensor
    fields: Mapping[str, Tensor]
    ids_B: Tensor
    keys_B: Tensor

    @property
    def numbered_fields(self) -> dict[str, Tensor]:
        """The fields, and `ids` and `keys` beside them."""
        return {**self.fields, "ids": self.ids_B, "keys": self.keys_B}

    def of_all(self, group: Group) -> Batch:
        """The shares of all ranks, in rank order. An all-gather of images, one of each field, one of ids and keys."""
        images_B3SS = group.all_gather(self.images_B3SS)
        fields = {name: group.all_gather(share) for name, share in self.fields.items()}
        numbers_B2 = group.all_gather(torch.stack([self.ids_B, self.keys_B], dim=1))
        return Batch(images_B3SS, fields, *numbers_B2.unbind(dim=1))


@dataclass(frozen=True)
class StreamSlice:
    """Which part of the global batch this rank trains on: its streams one after the other, cut into micro-batches.

    Ranks that train on the same images may load a share of them each: number `share` of `num_shares` equal ones.
    """

    streams: tuple[int, ...]
    samples_per_stream_step: int  # of one optimizer step
    num_micro_batches: int
    share: int = 0
    num_shares: int = 1

    @property
    def micro_batch(self) -> int:
        """Images of a micro-batch on this rank."""
        return len(self.streams) * self.samples_per_stream_step // self.num_micro_batches

    @property
    def loaded(self) -> slice:
        """Images of a micro-batch that this rank loads."""
        size = self.micro_batch // self.num_shares
        return slice(self.share * size, (self.share + 1) * size)

    def spans(self, micro_batch: int) -> list[tuple[int, int, int]]:
        """Stream, first sample (from the beginning of training) and count of each part of a micro-batch.

        `micro_batch` counts from the beginning of training too.
        """
        step, number = divmod(micro_batch, self.num_micro_batches)
        begin, end = number * self.micro_batch, (number + 1) * self.micro_batch
        found = []
        for place, stream in enumerate(self.streams):
            low = max(begin - place * self.samples_per_stream_step, 0)
            high = min(end - place * self.samples_per_stream_step, self.samples_per_stream_step)
            if low < high:
                found.append((stream, step * self.samples_per_stream_step + low, high - low))
        return found


class TrainLoader:
    """Endless micro-batches from a given optimizer step on; `wait_s` adds up the time spent waiting for data."""

    def __init__(
        self,
        data: TrainingData,
        order: Order,
        batch_slice: StreamSlice,
        pixels: PixelFormat,
        augment: AugmentConfig,
        device: torch.device,
        num_threads: int,
        prefetch: int = 2,
    ) -> None:
        self._data, self._index, self._order, self._batch_slice = data, data.index, order, batch_slice
        self._augment, self._device, self._prefetch = augment, device, prefetch
        self._reader = ShardReader(data.index)
        self._decoder = ImageDecoder(
            batch_slice.micro_batch // batch_slice.num_shares,
            pixels,
            device,
            num_threads,
            changes_colors=augment.changes_colors,
        )
        self.wait_s = 0.0

    def batches(self, first_step: int) -> Generator[Batch, None, None]:
        """Micro-batches of steps `first_step`, `first_step + 1`, ... in order.

        Files are read by one background thread, images decoded by DALI's threads, both ahead of the consumer.
        """
        micro_batch = first_step * self._batch_slice.num_micro_batches
        read: deque[Future[tuple[EncodedBatch, dict[str, np.ndarray], np.ndarray]]] = deque()
        decoding: deque[tuple[dict[str, np.ndarray], np.ndarray]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="read-shards") as pool:
            try:
                while True:
                    begin = time.perf_counter()
                    while len(read) < self._prefetch:
                        read.append(pool.submit(self._read, micro_batch))
                        micro_batch += 1
                    while len(decoding) < 2:  # one decodes while the other is consumed
                        encoded, fields, numbers_B2 = read.popleft().result()
                        self._decoder.push(encoded)
                        decoding.append((fields, numbers_B2))
                        read.append(pool.submit(self._read, micro_batch))
                        micro_batch += 1
                    images = self._decoder.pop()
                    fields, numbers_B2 = decoding.popleft()
                    on_device = {name: self._to_device(array) for name, array in fields.items()}
                    batch = Batch(images, on_device, *self._to_device(numbers_B2).unbind(dim=1))
                    self.wait_s += time.perf_counter() - begin
                    yield batch
            finally:
                for future in read:
                    future.cancel()

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def _read(self, micro_batch: int) -> tuple[EncodedBatch, dict[str, np.ndarray], np.ndarray]:
        """Encoded images with their augmentation, fields and numbers of this rank's share of a micro-batch."""
        parts = [self._order.global_ids(*span) for span in self._batch_slice.spans(micro_batch)]
        ids, epochs = (np.concatenate(column)[self._batch_slice.loaded] for column in zip(*parts, strict=True))
        shards, places = self._order.locate(ids)
        rows = self._data.rows(shards, places)
        samples = [self._index.samples(int(shard)) for shard in shards]
        images = [self._reader.read(int(s), t.image, int(r)) for s, t, r in zip(shards, samples, rows, strict=True)]
        sizes = np.stack([table.sizes_N2[row] for table, row in zip(samples, rows, strict=True)])
        boxes, flips = np.empty((len(ids), 4), np.int32), np.zeros(len(ids), np.int32)
        colors, noise_keys = np.empty((len(ids), NUM_COLORS), np.float32), np.empty(len(ids), np.int64)
        augment, seed = self._augment, self._order.seed
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            draw = ids[chosen], int(epoch), seed
            boxes[chosen], flips[chosen] = random_boxes(sizes[chosen], *draw, augment.crop_area, augment.crop_aspect)
            colors[chosen] = random_colors(*draw, augment.color_jitter, augment.hue_jitter)
            noise_keys[chosen] = random_keys(*draw)
        fields = {name: field.read(shards, rows, noise_keys) for name, field in self._data.fields.items()}
        keys = [f"{self._index.shards[int(s)].path}:{t.keys[r]}" for s, t, r in zip(shards, samples, rows, strict=True)]
        flips = flips if self._augment.flip else np.zeros_like(flips)
        numbers_B2 = np.stack([ids.astype(np.int64), noise_keys], axis=1)
        return EncodedBatch(images, boxes, flips, ", ".join(keys), colors), fields, numbers_B2

    def close(self) -> None:
        """Close the tars."""
        self._reader.close()


def shard_images(index: ShardIndex, shard: int, decoder: EvaluationDecoder) -> Iterator[Tensor]:
    """All images of one shard in index order, as the decoder's model takes them, in batches [<= its size, 3, S, S]."""
    samples = index.samples(shard)
    reader = ShardReader(index)
    batch_size, queued = decoder.batch_size, 0
    try:
        for begin in range(0, len(samples.keys), batch_size):
            rows = range(begin, min(begin + batch_size, len(samples.keys)))
            encoded = [reader.read(shard, samples.image, row) for row in rows]
            origin = f"{index.shards[shard].path}, keys {samples.keys[rows[0]]} to {samples.keys[rows[-1]]}"
            decoder.push(WholeImages(encoded, samples.sizes_N2[rows.start : rows.stop], origin))
            queued += 1
            if queued == 2:
                yield decoder.pop()
                queued -= 1
        for _ in range(queued):
            yield decoder.pop()
    finally:
        reader.close()
