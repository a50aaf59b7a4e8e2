"""Which sample comes when: a pure function of the seed and the number of samples consumed.

The global batch is made of `num_streams` equal parts. In each epoch the shards are permuted and the sequence of all
their samples is cut into `num_streams` equal segments, one a stream. A stream reads its segment from left to right and
permutes the samples inside windows of `shuffle_window`, so that reading stays local: a window covers a few shards.
A rank serves num_streams / R streams. Hence the batches are the same, to the sample, on every number of ranks that
divides `num_streams`, and a run is resumed from one integer. The samples left over by the division (fewer than
`num_streams`) differ from epoch to epoch.
"""

from __future__ import annotations

import functools
from typing import Protocol

import numpy as np

MIX_1, MIX_2, GOLDEN = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(0x9E3779B97F4A7C15)


def mix64(values: np.ndarray) -> np.ndarray:
    """splitmix64's output function (Steele et al. 2014): a bijection of uint64 whose values look random."""
    with np.errstate(over="ignore"):
        values = values + GOLDEN
        values = (values ^ (values >> np.uint64(30))) * MIX_1
        values = (values ^ (values >> np.uint64(27))) * MIX_2
        return values ^ (values >> np.uint64(31))


def uniforms(seed: int, epoch: int, ids_N: np.ndarray, num_draws: int) -> np.ndarray:
    """[N, num_draws] numbers in [0, 1), a function of (seed, epoch, id, draw) alone, whichever rank asks for them."""
    key = mix64(mix64(np.array([seed], np.uint64)) + np.uint64(epoch))
    keys_N = mix64(ids_N.astype(np.uint64) + key)
    with np.errstate(over="ignore"):
        draws = mix64(keys_N[:, None] + GOLDEN * np.arange(1, num_draws + 1, dtype=np.uint64)[None, :])
    return (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Order(Protocol):
    """Which samples the loader reads, and with which draws."""

    seed: int

    def global_ids(self, stream: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples `start ... start + count` of a stream, counted from the beginning of training: global ids [count]
        (rows of the whole shard set, in index order) and epochs [count], which tell the draws for an id apart."""

    def locate(self, ids_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row in the shard of global ids."""


class SampleOrder:
    """The order of training. `counts_S` holds the number of samples of each shard."""

    def __init__(self, counts_S: np.ndarray, num_streams: int, shuffle_window: int, seed: int) -> None:
        self.counts_S, self.num_streams, self.shuffle_window, self.seed = counts_S, num_streams, shuffle_window, seed
        self.num_samples = int(counts_S.sum())
        self._firsts_S = np.concatenate([[0], np.cumsum(counts_S)[:-1]])  # global id of each shard's first sample
        self._window = functools.lru_cache(maxsize=1024)(self._permuted_window)

    @property
    def samples_per_stream(self) -> int:
        """Length of a stream's segment: an epoch's samples over `num_streams`."""
        return self.num_samples // self.num_streams

    def global_ids(self, stream: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples `start ... start + count` of a stream, counted from the beginning of training.

        Returns global ids [count] (rows of the whole shard set, in index order) and epochs [count].
        """
        positions = np.arange(start, start + count)
        epochs, inside = positions // self.samples_per_stream, positions % self.samples_per_stream
        ids = np.empty(count, dtype=np.int64)
        for epoch, window in np.unique(np.stack([epochs, inside // self.shuffle_window], axis=1), axis=0):
            wanted = (epochs == epoch) & (inside // self.shuffle_window == window)
            ids[wanted] = self._window(int(epoch), stream, int(window))[inside[wanted] % self.shuffle_window]
        return ids, epochs

    def locate(self, ids_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row in the shard of global ids."""
        shards_N = np.searchsorted(self._firsts_S, ids_N, side="right") - 1
        return shards_N, ids_N - self._firsts_S[shards_N]

    def _permuted_window(self, epoch: int, stream: int, window: int) -> np.ndarray:
        """Global ids of one window of a stream."""
        shards = np.random.default_rng([self.seed, epoch]).permutation(len(self.counts_S))
        ends = np.cumsum(self.counts_S[shards])  # of each shard, in the epoch's sequence of samples
        # The cut starts elsewhere in every epoch, so that the remainder is not always the same samples.
        rotation = int(np.random.default_rng([self.seed, epoch, 1]).integers(self.num_samples))
        length = min(self.shuffle_window, self.samples_per_stream - window * self.shuffle_window)
        begin = rotation + stream * self.samples_per_stream + window * self.shuffle_window
        places = (begin + np.arange(length)) % self.num_samples
        which = np.searchsorted(ends, places, side="right")
        ids = self._firsts_S[shards[which]] + places - (ends[which] - self.counts_S[shards[which]])
        return np.random.default_rng([self.seed, epoch, stream, window]).permutation(ids)
