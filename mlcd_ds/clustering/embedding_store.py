"""Embeddings on disk, seen by a rank as its contiguous slice of all rows. Memory-mapped; shards may be uneven.

N rows, B rows of a block, K chosen rows, E embedding width; a slice crosses shard borders where it must.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mlcd_ds.artefacts.manifest import Manifest, output_array, output_path, read_manifest, remake, shards_problem
from mlcd_ds.artefacts.readers import read_array
from mlcd_ds.clustering.row_sampling import Sample

KEPT_BYTES = 64 * 2**20  # of a slice's rows in fp32; not in the memory that `--dry-run` tells


class EmbeddingManifest(Manifest):
    """Manifest of `mlcd embed`. `shards` lists name and number of rows, in index order; empty shards have no file."""

    num_images: int
    dim: int
    shards: list[tuple[str, int]]

    def problem(self) -> str | None:
        """Shards that do not add up, or an index that is not named."""
        if "index" not in self.inputs:
            return "it names no index as its input"
        return shards_problem(self.shards, self.num_images, self.files, (".npy",))


def embedding_rows(folder: Path, manifest: EmbeddingManifest, name: str, count: int) -> np.ndarray:
    """fp16 [n, E] of one shard, memory-mapped, after its checksum was compared."""
    # Mode "c" is private to this process: nothing is ever written back.
    return output_array(folder, manifest, f"{name}.npy", np.float16, (count, manifest.dim), mmap="c")


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
    shape: tuple[int, int]  # of the whole file

    def rows(self) -> Tensor:
        """fp16 [N, E], memory-mapped. Opened on each use: a mapping holds a file descriptor, and shards are many."""
        fix = remake("embed", self.path.parent)
        return torch.from_numpy(read_array(self.path, fix, np.float16, self.shape, mmap="c")[self.begin : self.end])


class EmbeddingStore:
    """One rank's slice of the embeddings. Opening it compares the checksum of every shard that the slice touches."""

    def __init__(self, folder: Path, rank: int = 0, num_ranks: int = 1) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder, EmbeddingManifest, "embed")
        self.num_rows, self.dim = self.manifest.num_images, self.manifest.dim
        self.begin, self.end = slice_bounds(self.num_rows, num_ranks, rank)
        self._pieces = list(self._open())
        self._excluded = np.zeros(0, dtype=np.int64)
        self._kept: tuple[Tensor, Tensor] | None = None
        self._everything: tuple[list[Piece], np.ndarray] | None = None

    def _open(self) -> Iterator[Piece]:
        first = 0
        for name, count in self.manifest.shards:
            begin, end = max(self.begin, first), min(self.end, first + count)
            if begin < end:
                path = output_path(self.folder, self.manifest, f"{name}.npy")
                yield Piece(path, begin - first, end - first, begin, (count, self.dim))
            first += count

    def blocks(self, block_rows: int, sample: Sample | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The slice's rows in order, or those of a sample: global numbers int64 [B] and rows fp16 [B, E].

        All blocks but the last have `block_rows` rows, however short the shards are. A slice small enough
        for one block is read once and kept in fp32: reading it each time would take longer than k-means.
        """
        num_rows = self.end - self.begin
        if sample is None and 0 < num_rows <= block_rows and num_rows * self.dim * 4 <= KEPT_BYTES:
            if self._kept is None:
                found = list(self._read_blocks(block_rows, None))
                self._kept = (found[0][0], found[0][1].float()) if found else None
            yield from [self._kept] if self._kept else []
        else:
            yield from self._read_blocks(block_rows, sample)

    def _read_blocks(self, block_rows: int, sample: Sample | None) -> Iterator[tuple[Tensor, Tensor]]:
        numbers: list[Tensor] = []
        rows: list[Tensor] = []
        missing = block_rows
        for piece in self._pieces:
            numbers_N = np.arange(piece.first_row, piece.first_row + piece.end - piece.begin)
            if sample is not None:
                numbers_N = numbers_N[sample.contains(numbers_N)]
            begin, end = np.searchsorted(self._excluded, (piece.first_row, piece.first_row + piece.end - piece.begin))
            if end > begin:
                numbers_N = np.setdiff1d(numbers_N, self._excluded[begin:end], assume_unique=True)
            rows_NE, begin = piece.rows(), 0
            while begin < len(numbers_N):
                taken_N = torch.from_numpy(numbers_N[begin : begin + missing])
                if len(numbers_N) == len(rows_NE):
                    rows.append(rows_NE[begin : begin + missing])
                else:
                    rows.append(rows_NE[taken_N - piece.first_row])
                numbers.append(taken_N)
                begin += len(taken_N)
                missing -= len(taken_N)
                if not missing:
                    yield torch.cat(numbers), torch.cat(rows)
                    numbers, rows, missing = [], [], block_rows
        if rows:
            yield torch.cat(numbers), torch.cat(rows)

    def exclude(self, numbers: np.ndarray) -> None:
        """Leave rows (sorted global numbers, of all ranks) out of `blocks` from now on; `num_rows` counts the rest."""
        self._excluded, self._kept = numbers, None
        self.num_rows = self.manifest.num_images - len(numbers)

    def numbers(self, places_K: np.ndarray) -> np.ndarray:
        """Global numbers int64 [K] of the rows at these places among those of all ranks that were not left out."""
        kept_before = self._excluded - np.arange(len(self._excluded))  # of each row left out, those ahead of it
        return places_K + np.searchsorted(kept_before, places_K, side="right")

    def read(self, numbers_K: np.ndarray) -> Tensor:
        """fp32 [K, E]: any rows, also those of other ranks' slices, which must lie on a shared disk."""
        if self._everything is None:
            first, pieces = 0, []
            for name, count in self.manifest.shards:
                pieces.append(Piece(self.folder / f"{name}.npy", 0, count, first, (count, self.dim)))
                first += count
            self._everything = pieces, np.array([piece.first_row for piece in pieces])
        pieces, firsts = self._everything
        rows_KE = torch.empty(len(numbers_K), self.dim)
        piece_K = np.searchsorted(firsts, numbers_K, side="right") - 1
        for number in np.unique(piece_K):
            here_K = torch.from_numpy(piece_K == number)
            wanted = torch.from_numpy(numbers_K)[here_K] - pieces[number].first_row
            rows_KE[here_K] = pieces[number].rows()[wanted].float()
        return rows_KE

    def place(self, number: int) -> str:
        """The file of one of this slice's rows, and the row in it."""
        piece = next(p for p in reversed(self._pieces) if p.first_row <= number)
        return f"{piece.path} row {piece.begin + number - piece.first_row}"

    def pick(self, numbers_K: np.ndarray) -> Tensor:
        """fp32 [K, E]: the given global rows where this slice has them, zero elsewhere."""
        picked_KE = torch.zeros(len(numbers_K), self.dim)
        for piece in self._pieces:
            here_K = (numbers_K >= piece.first_row) & (numbers_K < piece.first_row + piece.end - piece.begin)
            if here_K.any():
                wanted = torch.from_numpy(numbers_K[here_K] - piece.first_row)
                picked_KE[torch.from_numpy(here_K)] = piece.rows()[wanted].float()
        return picked_KE
