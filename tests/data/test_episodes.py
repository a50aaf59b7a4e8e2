"""Episodes: which samples they hold, that ranks see the same, and that a sample's second crop is another."""

from __future__ import annotations

import numpy as np
import pytest

from mlcd_ds.data import episodes
from mlcd_ds.data.crops import random_boxes
from mlcd_ds.data.episodes import EpisodeOrder, occurrences, permuted
from mlcd_ds.data.loader import StreamSlice

COUNTS = np.array([97, 3, 0, 250, 160, 1, 80])  # 591
NUM_STREAMS, BATCH, SAMPLES = 12, 24, 96


def make_order(is_with_replacement: bool, seed: int = 5, samples: int = SAMPLES) -> EpisodeOrder:
    return EpisodeOrder(COUNTS, NUM_STREAMS, samples, is_with_replacement, seed)


def pairs_of(order: EpisodeOrder, number: int) -> list[tuple[int, int]]:
    """(id, epoch) of an episode's places."""
    ids, epochs = order.episode(number)
    return list(zip(ids.tolist(), epochs.tolist(), strict=True))


def batch_of(order: EpisodeOrder, step: int, num_ranks: int, num_micro_batches: int = 1) -> list[tuple[int, int]]:
    """(id, epoch) of a step's global batch, in rank order."""
    found = []
    for rank in range(num_ranks):
        streams = tuple(range(rank * NUM_STREAMS // num_ranks, (rank + 1) * NUM_STREAMS // num_ranks))
        part = StreamSlice(streams, BATCH // NUM_STREAMS, num_micro_batches)
        for number in range(step * num_micro_batches, (step + 1) * num_micro_batches):
            for span in part.spans(number):
                ids, epochs = order.global_ids(*span)
                found += list(zip(ids.tolist(), epochs.tolist(), strict=True))
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 591, 4097])
def test_a_permutation_holds_each_number_once(size: int) -> None:
    found = permuted(np.arange(size), size, 7)
    assert sorted(found.tolist()) == list(range(size))
    assert np.array_equal(permuted(np.arange(size)[::-1], size, 7), found[::-1]), "a function of the value alone"
    if size > 16:
        assert (found == permuted(np.arange(size), size, 8)).mean() < 0.05
        assert (found == np.arange(size)).mean() < 0.1 and abs(np.corrcoef(found, np.arange(size))[0, 1]) < 0.3


def test_permutations_are_even() -> None:
    """Where a value lands, over many keys: the chi-square statistic of 10 places is far from that of a fixed place."""
    places = np.array([permuted(np.array([3]), 10, key)[0] for key in range(1000)])
    counts = np.bincount(places, minlength=10)
    assert ((counts - 100) ** 2 / 100).sum() < 30, counts


@pytest.mark.parametrize("samples", [96, 480, 588])
def test_without_replacement_a_permutation_is_used_up(samples: int) -> None:
    order, per_permutation = make_order(False, samples=samples), 591 // samples
    for first in range(0, 3 * per_permutation, per_permutation):
        ids = np.concatenate([order.episode(first + part)[0] for part in range(per_permutation)])
        assert len(np.unique(ids)) == len(ids) and 0 <= ids.min() and ids.max() < 591
    assert not np.array_equal(order.episode(0)[0], order.episode(per_permutation)[0])
    assert all(np.all(order.episode(number)[1] == number * samples) for number in range(4))


def test_with_replacement_samples_come_twice_and_their_crops_differ() -> None:
    order = make_order(True)
    ids, epochs = order.episode(3)
    counts = np.bincount(ids, minlength=591)
    # Of 96 draws of 591, seven pairs are expected.
    assert 1 < (counts > 1).sum() < 25 and ids.max() > 500 and ids.min() < 90
    twice = int(np.flatnonzero(counts > 1)[0])
    first, second = epochs[ids == twice][:2]
    assert second == first + 1, "the draws are told apart"
    sizes, one = np.array([[300, 400]]), np.array([twice])
    boxes = [random_boxes(sizes, one, int(epoch), 5, (0.3, 1.0), (0.75, 1.33))[0] for epoch in (first, second, first)]
    assert np.array_equal(boxes[0], boxes[2]) and not np.array_equal(boxes[0], boxes[1])
    everything = [
        pair for number in range(6) for pair in zip(*map(np.ndarray.tolist, order.episode(number)), strict=True)
    ]
    assert len(set(everything)) == len(everything), "no draw comes twice, in no episode"


def test_draws_over_many_epochs_do_not_wrap() -> None:
    """Numbers of epochs beyond 2^53 still give draws of their own."""
    sizes, one = np.array([[300, 400]]), np.array([7])
    boxes = {random_boxes(sizes, one, 2**60 + n, 5, (0.3, 1.0), (0.75, 1.33))[0].tobytes() for n in range(20)}
    assert len(boxes) == 20


@pytest.mark.parametrize("is_with_replacement", [True, False])
def test_every_number_of_ranks_sees_the_same_batches(is_with_replacement: bool) -> None:
    order, per_episode = make_order(is_with_replacement), SAMPLES // BATCH
    for step in range(3 * per_episode):
        whole = batch_of(order, step, 1)
        assert len(whole) == BATCH
        for num_ranks in (2, 3, 4, 12):
            for num_micro_batches in (1, 2):
                assert batch_of(make_order(is_with_replacement), step, num_ranks, num_micro_batches) == whole
        assert batch_of(make_order(is_with_replacement, seed=6), step, 1) != whole
    for number in range(3):  # the steps of an episode make it up
        steps = range(number * per_episode, (number + 1) * per_episode)
        seen = sorted(pair for step in steps for pair in batch_of(order, step, 2))
        assert seen == sorted(pairs_of(order, number))


def test_ids_lie_where_they_are_said_to() -> None:
    order = make_order(False)
    shards, rows = order.locate(np.array([0, 96, 97, 99, 100, 349, 350, 509, 510, 511, 590]))
    assert shards.tolist() == [0, 0, 1, 1, 3, 3, 4, 4, 5, 6, 6]
    assert rows.tolist() == [0, 96, 0, 2, 0, 249, 0, 159, 0, 0, 79]


def test_occurrences_count_what_came_before() -> None:
    assert occurrences(np.array([4, 2, 4, 4, 9, 2])).tolist() == [0, 0, 1, 2, 0, 1]
    assert not occurrences(np.arange(5)).any()


def test_twins_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known-bad: one permutation for all; occurrences that are not counted."""
    monkeypatch.setattr(episodes, "occurrences", lambda ids_N: np.zeros(len(ids_N), np.int64))
    pairs = pairs_of(make_order(True), 3)
    assert len(set(pairs)) < len(pairs)
    monkeypatch.setattr(episodes, "permuted", lambda values_N, size, key: values_N)
    order = make_order(False)
    assert np.array_equal(order.episode(0)[0], order.episode(6)[0])
