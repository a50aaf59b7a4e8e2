"""Whole images of any samples, without noise, for features of a model while it trains.

B images of a batch, N samples.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mlcd_ds.data.dali import EvaluationDecoder, WholeImages
from mlcd_ds.data.pixels import PixelFormat
from mlcd_ds.data.shard_index import ShardIndex, ShardReader


class WholeImageReader:
    """Reads and decodes; `source` stands in messages."""

    def __init__(
        self,
        index: ShardIndex,
        batch_size: int,
        pixels: PixelFormat,
        device: torch.device,
        num_threads: int,
        source: str,
    ) -> None:
        self._index, self._source = index, source
        self._decoder = EvaluationDecoder(batch_size, pixels, device, num_threads=num_threads)

    def batches(self, shards_N: np.ndarray, rows_N: np.ndarray) -> Iterator[Tensor]:
        """The images in these rows of these shards, in batches [<= batch_size, 3, S, S]; one decodes while another is
        used."""
        reader, size, queued = ShardReader(self._index), self._decoder.batch_size, 0
        try:
            for begin in range(0, len(shards_N), size):
                places = zip(shards_N[begin : begin + size], rows_N[begin : begin + size], strict=True)
                self._decoder.push(self._read(reader, [(int(shard), int(row)) for shard, row in places]))
                queued += 1
                if queued == 2:
                    yield self._decoder.pop()
                    queued -= 1
            for _ in range(queued):
                yield self._decoder.pop()
        finally:
            reader.close()

    def _read(self, reader: ShardReader, places: list[tuple[int, int]]) -> WholeImages:
        samples = [self._index.samples(shard) for shard, _ in places]
        read = [reader.read(shard, table.image, row) for (shard, row), table in zip(places, samples, strict=True)]
        sizes = np.stack([table.sizes_N2[row] for (_, row), table in zip(places, samples, strict=True)])
        return WholeImages(read, sizes, self._source)
