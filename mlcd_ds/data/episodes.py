"""An order in episodes: so many samples are drawn, learned from once, and others are drawn.

What an episode holds is a pure function of (seed, episode), with or without replacement. An episode's places are cut
into `num_streams` equal segments, one a stream, so that every number of ranks that divides `num_streams` sees the same
global batches. Samples lie anywhere in the shards: reading is not local as in `order.py`.

N places of an episode, each with a sample.
"""

from __future__ import annotations

import functools

import numpy as np

from mlcd_ds.data.order import locate_in, mix64, uniforms

APART = 2**32  # added to the seed, which is smaller: crops are drawn by the seed itself
ROUNDS = 6


def permuted(values_N: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a random permutation of 0 ... size - 1 puts these values, int64; no table of it is made.

    A Feistel network (Luby & Rackoff, 1988) permutes the next power of four; what falls outside `size` goes through it
    again until it does not (cycle walking: Black & Rogaway, 2002), less than four times on average.
    """
    half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = mix64(np.uint64(key) + np.arange(ROUNDS, dtype=np.uint64))
    found_N = values_N.astype(np.uint64)
    left = np.arange(len(found_N))
    while len(left):
        high, low = found_N[left] >> half, found_N[left] & mask
        for round_key in keys:
            high, low = low, high ^ (mix64(low ^ round_key) & mask)
        found_N[left] = (high << half) | low
        left = left[found_N[left] >= size]
    return found_N.astype(np.int64)


def occurrences(ids_N: np.ndarray) -> np.ndarray:
    """int64 [N]: how often each id stands before itself."""
    order_N = np.argsort(ids_N, kind="stable")
    sorted_N = ids_N[order_N]
    found_N = np.empty(len(ids_N), np.int64)
    found_N[order_N] = np.arange(len(ids_N)) - np.searchsorted(sorted_N, sorted_N)
    return found_N


class EpisodeOrder:
    """`counts_S`: samples of each shard. Without replacement a permutation of all samples is cut into episodes, and a
    new one taken when fewer are left than an episode has."""

    def __init__(
        self, counts_S: np.ndarray, num_streams: int, episode_samples: int, is_with_replacement: bool, seed: int
    ) -> None:
        assert episode_samples % num_streams == 0
        self.seed, self.episode_samples, self._is_with_replacement = seed, episode_samples, is_with_replacement
        self._per_stream = episode_samples // num_streams
        self.num_samples = int(counts_S.sum())
        self._firsts_S = np.cumsum(counts_S) - counts_S
        self.episode = functools.lru_cache(maxsize=2)(self._draw)

    def global_ids(self, stream: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples `start ... start + count` of a stream, counted from the beginning of training: global ids [count]
        and epochs [count], which tell the draws for an id apart."""
        positions = np.arange(start, start + count)
        episodes, places = positions // self._per_stream, stream * self._per_stream + positions % self._per_stream
        ids, epochs = np.empty(count, np.int64), np.empty(count, np.int64)
        for number in np.unique(episodes):
            chosen = episodes == number
            all_ids, all_epochs = self.episode(int(number))
            ids[chosen], epochs[chosen] = all_ids[places[chosen]], all_epochs[places[chosen]]
        return ids, epochs

    def locate(self, ids_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row in the shard of global ids."""
        return locate_in(self._firsts_S, ids_N)

    def _draw(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and epochs, int64 [N], of all places of an episode."""
        places_N = np.arange(self.episode_samples)
        if self._is_with_replacement:
            draws_N = uniforms(self.seed + APART, number, places_N, 1)[:, 0]
            ids_N = (draws_N * self.num_samples).astype(np.int64)
        else:
            permutation, part = divmod(number, self.num_samples // self.episode_samples)
            key = mix64(np.array([self.seed + APART], np.uint64)) ^ mix64(np.array([permutation], np.uint64))
            ids_N = permuted(places_N + part * self.episode_samples, self.num_samples, int(key[0]))
        return ids_N, number * self.episode_samples + occurrences(ids_N)
