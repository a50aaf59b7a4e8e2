"""Embeddings on disk, seen by a rank as its contiguous slice of all rows. Memory-mapped; shards may be uneven.

N all rows, E embedding width; a slice crosses shard borders where it must.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlcd_ds.manifest import Manifest, check_file, read_manifest


class EmbeddingManifest(Manifest):
    """Manifest of `mlcd embed`. `shards` lists name and number of rows, in index order; empty shards have no file."""

    num_images: int
    dim: int
    shards: list[tuple[str, int]]


def slice_bounds(num_rows: int, num_parts: int, part: int) -> tuple[int, int]:
    """Begin and end of one of `num_parts` nearly equal contiguous parts."""
    return num_rows * part // num_parts, num_rows * (part + 1) // num_parts


@dataclass(frozen=True)
class Piece:
    """Rows [begin, end) of one shard's file, which are the global rows from `first_row` on."""

    path: Path
    begin: int
    end: int
    first_row: int

    def rows(self) -> np.ndarray:
        """fp16 [N, E], memory-mapped. Opened on each use: a mapping holds a file descriptor, and shards are many."""
        return np.load(self.path, mmap_mode="r", allow_pickle=False)[self.begin : self.end]


class EmbeddingStore:
    """One rank's slice of the embeddings. Opening it compares the checksum of every shard that the slice touches."""

    def __init__(self, folder: Path, rank: int = 0, num_ranks: int = 1) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder, EmbeddingManifest, "embed")
        self.num_rows, self.dim = self.manifest.num_images, self.manifest.dim
        self.begin, self.end = slice_bounds(self.num_rows, num_ranks, rank)
        self._pieces = list(self._open())

    def _open(self) -> Iterator[Piece]:
        first = 0
        for name, count in self.manifest.shards:
            begin, end = max(self.begin, first), min(self.end, first + count)
            if begin < end:
                path = check_file(self.folder, f"{name}.npy", self.manifest.files[f"{name}.npy"], "embed")
                yield Piece(path, begin - first, end - first, begin)
            first += count

    def blocks(self, block_rows: int) -> Iterator[np.ndarray]:
        """The slice's rows in order, as fp32 blocks of at most `block_rows`."""
        for piece in self._pieces:
            rows_NE = piece.rows()
            for begin in range(0, len(rows_NE), block_rows):
                yield rows_NE[begin : begin + block_rows].astype(np.float32)

    def pick(self, rows_K: np.ndarray) -> np.ndarray:
        """fp32 [K, E]: the given global rows where this slice has them, zero elsewhere."""
        picked_KE = np.zeros((len(rows_K), self.dim), dtype=np.float32)
        for piece in self._pieces:
            here = (rows_K >= piece.first_row) & (rows_K < piece.first_row + piece.end - piece.begin)
            if here.any():
                picked_KE[here] = piece.rows()[rows_K[here] - piece.first_row]
        return picked_KE
