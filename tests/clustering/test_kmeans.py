"""K-means over ranks against a float64 oracle and faiss; phases, early stops, resuming. Real faiss, real gloo."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from distributed_harness import assert_close, assert_differs, run_ranks
from embeddings_maker import all_rows_of, blobs, write_embeddings

from mlcd_ds.clustering import kmeans as module
from mlcd_ds.clustering.assigner import Assigner, Metric
from mlcd_ds.clustering.blockwise import BlockwiseAssigner
from mlcd_ds.clustering.embedding_store import EmbeddingStore
from mlcd_ds.clustering.faiss_assigner import FaissAssigner
from mlcd_ds.clustering.first_centers import random_centers
from mlcd_ds.clustering.kmeans import Clustering, Iteration, Phase, Rules, kmeans, make_phases, next_phase
from mlcd_ds.clustering.repair import Repair
from mlcd_ds.clustering.row_sampling import Sample, uniforms
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.errors import UserError

NUM_CENTERS = 13  # divides by neither 2 nor 3
TOLERANCE = 1e-6  # measured: 6e-8 between 1, 2 and 3 ranks, 1e-7 to float64
SHARDS = (301, 1, 118, 0, 402)  # divides by neither 2 nor 3
CPU = torch.device("cpu")


def make_rules(num_iterations: int, metric: Metric = "cosine", **changed: object) -> Rules:
    return replace(Rules(metric, (Phase(1.0, num_iterations),), 0.0, Repair(metric), seed=3), **changed)


def make_assigner(name: str, metric: Metric) -> Assigner:
    return FaissAssigner(metric) if name == "faiss" else BlockwiseAssigner(metric, name == "bf16", CPU)


def run(group: Group, folder: Path, rules: Rules, start: Clustering | None = None, name: str = "torch") -> Clustering:
    store = EmbeddingStore(folder, group.rank, group.size)
    if start is None:
        centers_CE = random_centers(store, group, NUM_CENTERS, rules.metric, seed=3)
        start = Clustering(centers_CE, np.zeros(NUM_CENTERS, np.int64))
    return kmeans(store, group, make_assigner(name, rules.metric), start, rules)


def tensors(clustering: Clustering) -> tuple[torch.Tensor, torch.Tensor]:
    return clustering.centers_CE, torch.tensor(clustering.objective)


def oracle(
    rows_NE: np.ndarray,
    start_CE: torch.Tensor,
    num_iterations: int,
    metric: Metric = "cosine",
    *,
    normalise: bool | None = None,
    samples: tuple[np.ndarray, ...] = (),
) -> Clustering:
    """Lloyd in float64, row by row. No cluster may become empty. `samples`: rows that an iteration reads."""
    centers, history = start_CE.double().numpy(), []
    normalise = metric == "cosine" if normalise is None else normalise
    for number in range(num_iterations):
        rows = rows_NE[samples[number]] if samples else rows_NE
        if metric == "cosine":
            values = rows @ centers.T
        else:
            values = -((rows[:, None] - centers) ** 2).sum(axis=2)
        nearest = values.argmax(axis=1)
        objective = abs(values.max(axis=1).mean())
        counts = np.bincount(nearest, minlength=len(centers))
        assert counts.min() > 0, "the data is meant to fill all clusters"
        centers = np.stack([rows[nearest == center].mean(axis=0) for center in range(len(centers))])
        if normalise:
            centers /= np.linalg.norm(centers, axis=1, keepdims=True)
        history.append(Iteration(0, float(objective), len(rows), 0))
    return Clustering(torch.from_numpy(centers), counts, tuple(history))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embeddings")
    write_embeddings(path, blobs(SHARDS, dim=24, num_blobs=9))
    return path


@pytest.fixture(scope="module")
def all_rows(folder: Path) -> np.ndarray:
    return all_rows_of(folder)


@pytest.fixture(scope="module", params=["cosine", "euclidean"])
def metric(request: pytest.FixtureRequest) -> Metric:
    return request.param


@pytest.fixture(scope="module")
def on_one_rank(folder: Path, lone_group: Group, metric: Metric) -> Clustering:
    return run(lone_group, folder, make_rules(5, metric))


SAMPLED = (Phase(0.3, 2), Phase(0.6, 1), Phase(1.0, 2))


def run_all(group: Group, folder: Path, halves: dict[Metric, Clustering]) -> dict[str, Clustering]:
    """What is compared over ranks, in one start of the ranks."""
    return {
        **{metric: run(group, folder, make_rules(5, metric)) for metric in halves},
        **{f"{metric}, resumed": run(group, folder, make_rules(5, metric), half) for metric, half in halves.items()},
        "samples": run(group, folder, make_rules(0, phases=SAMPLED)),
    }


@pytest.fixture(scope="module")
def on_ranks(folder: Path, lone_group: Group) -> dict[int, list[dict[str, Clustering]]]:
    """Results of every rank, by number of ranks."""
    halves = {metric: run(lone_group, folder, make_rules(2, metric)) for metric in ("cosine", "euclidean")}
    results = {number: run_ranks(run_all, number, folder, halves) for number in (2, 3)}
    return {1: [run_all(lone_group, folder, halves)], **results}


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_every_number_of_ranks_gives_the_same(
    on_ranks: dict[int, list[dict[str, Clustering]]], on_one_rank: Clustering, num_ranks: int, metric: Metric
) -> None:
    results = [rank[metric] for rank in on_ranks[num_ranks]]
    for other in results[1:]:
        assert torch.equal(other.centers_CE, results[0].centers_CE), "the ranks hold different centres"
    for name, got, wanted in zip(("centres", "objective"), tensors(results[0]), tensors(on_one_rank), strict=True):
        assert_close(name, got, wanted, TOLERANCE)
    assert np.array_equal(results[0].counts_C, on_one_rank.counts_C)
    assert results[0].num_splits == on_one_rank.num_splits == (0,) * 5


def test_five_iterations_are_those_of_the_float64_oracle(
    folder: Path, on_one_rank: Clustering, all_rows: np.ndarray, lone_group: Group, metric: Metric
) -> None:
    start_CE = random_centers(EmbeddingStore(folder), lone_group, NUM_CENTERS, metric, seed=3)
    wanted = oracle(all_rows, start_CE, 5, metric)
    for name, got, expected in zip(("centres", "objective"), tensors(on_one_rank), tensors(wanted), strict=True):
        assert_close(name, got, expected, TOLERANCE)
    assert np.array_equal(on_one_rank.counts_C, wanted.counts_C) and on_one_rank.counts_C.sum() == len(all_rows)
    # Known-bad twins: one iteration fewer; a rank's last row lost; centres normalised or not, the other way round.
    for bad in (
        oracle(all_rows, start_CE, 4, metric),
        oracle(all_rows[:-1], start_CE, 5, metric),
        oracle(all_rows, start_CE, 5, metric, normalise=metric != "cosine"),
    ):
        assert_differs("centres", tensors(on_one_rank)[0], tensors(bad)[0], TOLERANCE)


@pytest.mark.parametrize("name", ["faiss", "bf16"])
def test_the_loop_is_the_same_with_every_assigner(
    folder: Path, on_one_rank: Clustering, lone_group: Group, metric: Metric, name: str
) -> None:
    other = run(lone_group, folder, make_rules(5, metric), name=name)
    if name == "faiss":
        assert_close("centres", other.centers_CE, on_one_rank.centers_CE, TOLERANCE)
    # bf16 assigns near ties otherwise, and scores what it found in fp32.
    assert_close("objective", tensors(other)[1], tensors(on_one_rank)[1], 1e-3 if name == "bf16" else TOLERANCE)


def test_the_objective_improves_and_is_that_of_faiss(
    folder: Path, all_rows: np.ndarray, lone_group: Group, metric: Metric
) -> None:
    start_CE = random_centers(EmbeddingStore(folder), lone_group, NUM_CENTERS, metric, seed=3)
    ours = run(lone_group, folder, make_rules(20, metric))
    rows = np.ascontiguousarray(all_rows, dtype=np.float32)
    spherical = metric == "cosine"
    theirs = faiss.Kmeans(rows.shape[1], NUM_CENTERS, niter=20, spherical=spherical, max_points_per_centroid=10**6)
    theirs.train(rows, init_centroids=start_CE.numpy().copy())

    def distance(centers_CE: np.ndarray) -> float:
        return float(((all_rows[:, None] - centers_CE.astype(np.float64)) ** 2).sum(axis=2).min(axis=1).mean())

    sign = -1 if spherical else 1
    assert distance(ours.centers_CE.numpy()) == pytest.approx(distance(theirs.centroids), rel=0.005)
    assert (sign * np.diff(ours.objective) < 1e-6).all() and sign * (ours.objective[-1] - ours.objective[0]) < -0.01
    assert 0.99 * distance(start_CE.numpy()) > distance(theirs.centroids), "known-bad twin: the start would pass"


def test_resuming_is_bitwise_the_same_and_works_on_other_ranks(
    on_ranks: dict[int, list[dict[str, Clustering]]], on_one_rank: Clustering, metric: Metric
) -> None:
    on, elsewhere = (on_ranks[number][0][f"{metric}, resumed"] for number in (1, 2))
    assert torch.equal(on.centers_CE, on_one_rank.centers_CE) and np.array_equal(on.counts_C, on_one_rank.counts_C)
    assert on.history == on_one_rank.history
    for name, got, wanted in zip(("centres", "objective"), tensors(elsewhere), tensors(on_one_rank), strict=True):
        assert_close(name, got, wanted, TOLERANCE)


def test_blocks_do_not_change_the_result(
    folder: Path, on_one_rank: Clustering, monkeypatch: pytest.MonkeyPatch, lone_group: Group, metric: Metric
) -> None:
    monkeypatch.setattr(module, "BLOCK_ROWS", 7)
    got = run(lone_group, folder, make_rules(5, metric))
    assert_close("centres", got.centers_CE, on_one_rank.centers_CE, TOLERANCE)


# Samples and phases


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_phases_on_samples_are_those_of_the_oracle(
    on_ranks: dict[int, list[dict[str, Clustering]]],
    folder: Path,
    all_rows: np.ndarray,
    lone_group: Group,
    num_ranks: int,
) -> None:
    results = [rank["samples"] for rank in on_ranks[num_ranks]]
    start_CE = random_centers(EmbeddingStore(folder), lone_group, NUM_CENTERS, "cosine", seed=3)
    numbers = np.arange(len(all_rows))
    samples = tuple(Sample(rate, 3).contains(numbers) for rate in (0.3, 0.3, 0.6, 1.0, 1.0))
    wanted = oracle(all_rows, start_CE, 5, samples=samples)
    for name, got, expected in zip(("centres", "objective"), tensors(results[0]), tensors(wanted), strict=True):
        assert_close(name, got, expected, TOLERANCE)
    assert [i.num_rows for i in results[0].history] == [int(sample.sum()) for sample in samples]
    assert [i.phase for i in results[0].history] == [0, 0, 1, 2, 2]
    bad = oracle(all_rows, start_CE, 5, samples=samples[:2] + samples[:1] + samples[3:])
    assert_differs("centres, the second sample not taken", results[0].centers_CE, bad.centers_CE, TOLERANCE)


def test_samples_are_nested_and_of_the_size_asked_for() -> None:
    rows = np.arange(10**6, 10**6 + 200_000)
    small, large = Sample(0.1, 5).contains(rows), Sample(0.4, 5).contains(rows)
    assert large[small].all() and abs(small.mean() - 0.1) < 0.003 and abs(large.mean() - 0.4) < 0.005
    parts = [uniforms(part, 5) for part in np.array_split(rows, 3)]
    assert np.array_equal(np.concatenate(parts), uniforms(rows, 5))
    assert not np.array_equal(uniforms(rows, 5), uniforms(rows, 6))


def test_small_data_are_never_sampled() -> None:
    assert make_phases(3581, 256, 20, (64,), 4) == (Phase(1.0, 20),)
    assert make_phases(64_000, 1000, 20, (64,), 4) == (Phase(1.0, 20),)
    assert make_phases(128_000, 1000, 20, (64,), 4) == (Phase(0.5, 16), Phase(1.0, 4))
    assert make_phases(128_000, 1000, 20, (64, 16, 512), 4) == (Phase(0.125, 8), Phase(0.5, 8), Phase(1.0, 4))
    assert make_phases(128_000, 1000, 3, (64,), 4) == (Phase(1.0, 3),)
    assert make_phases(128_000, 1000, 20, (), 4) == make_phases(128_000, 1000, 20, (0,), 4) == (Phase(1.0, 20),)


def test_a_phase_ends_when_it_hardly_improves(folder: Path, lone_group: Group, metric: Metric) -> None:
    rules = make_rules(100, metric, tolerance=1e-3)
    done = run(lone_group, folder, rules)
    values = [module.distortion(value, metric) for value in done.objective]
    falls = [(a - b) / a for a, b in pairwise(values)]
    assert 3 < done.num_iterations < 60 and falls[-1] < 1e-3 <= min(falls[:-1])
    assert next_phase(done.history, rules) is None
    two = replace(rules, phases=(Phase(0.5, 50), Phase(1.0, 50)))
    assert next_phase(done.history, two) == 1 and next_phase(done.history[:-1], two) == 0
    assert next_phase((), two) == 0


def history_of(*iterations: tuple[float, int]) -> tuple[Iteration, ...]:
    """Iterations of one phase: mean squared distance, number of splits."""
    return tuple(Iteration(0, objective, 100, num_splits) for objective, num_splits in iterations)


def test_a_phase_does_not_end_right_after_a_split() -> None:
    """The rise that a split causes is measured in the next iteration: only the one after that says what it is worth."""
    rules = make_rules(10, "euclidean", tolerance=1e-3)
    rise = history_of((1.0, 0), (0.9, 4), (0.95, 0))
    assert next_phase(rise, rules) == 0
    assert next_phase(history_of((1.0, 0), (0.9, 0), (0.8999, 4)), rules) == 0, "moved centres have not converged"
    assert next_phase((*rise, *history_of((0.8, 0))), rules) == 0, "it still improves"
    assert next_phase((*rise, *history_of((0.9499, 0))), rules) is None
    # Known-bad twin: the same objectives without the split.
    assert next_phase(history_of((1.0, 0), (0.9, 0), (0.95, 0)), rules) is None


def test_without_a_tolerance_it_ends_once_converged(folder: Path, lone_group: Group, metric: Metric) -> None:
    done = run(lone_group, folder, make_rules(100, metric))
    assert done.num_iterations < 100 and next_phase(done.history, make_rules(100, metric)) is None
    further = run(lone_group, folder, make_rules(1, metric), replace(done, history=()))
    assert np.array_equal(further.counts_C, done.counts_C)
    assert_close("centres", further.centers_CE, done.centers_CE, TOLERANCE)
    short = run(lone_group, folder, make_rules(5, metric))
    assert next_phase(short.history, make_rules(100, metric)) == 0, "known-bad twin: five iterations do not converge"


def test_a_callback_ends_the_run(folder: Path, lone_group: Group) -> None:
    store, rules, seen = EmbeddingStore(folder), make_rules(5), []
    start_CE = random_centers(store, lone_group, NUM_CENTERS, "cosine", seed=3)
    start = Clustering(start_CE, np.zeros(NUM_CENTERS, np.int64))

    def stop_at_two(now: Clustering) -> bool:
        seen.append(now.num_iterations)
        return now.num_iterations < 2

    done = kmeans(store, lone_group, FaissAssigner(), start, rules, stop_at_two)
    assert seen == [1, 2] and done.num_iterations == 2 and next_phase(done.history, rules) == 0


def test_a_row_that_is_not_finite_is_named(tmp_path: Path, lone_group: Group) -> None:
    shards = blobs((30, 20), dim=8, num_blobs=2)
    shards[1][7, 3] = np.nan
    write_embeddings(tmp_path, shards)
    with pytest.raises(UserError, match=r"00001\.npy row 7 is not finite"):
        run(lone_group, tmp_path, make_rules(1))


# Empty clusters


def test_empty_clusters_are_split_from_the_largest_and_reported(tmp_path: Path, lone_group: Group) -> None:
    write_embeddings(tmp_path, blobs((60, 61), dim=8, num_blobs=3))
    rows = all_rows_of(tmp_path).astype(np.float32)
    far = np.zeros((2, 8), np.float32)
    far[:, 0] = -1.0
    far[:, 1] = (0.0, 1e-3)
    centers = torch.from_numpy(np.concatenate([rows[:3], far - 10 * rows.mean(axis=0)]))
    start = Clustering(torch.nn.functional.normalize(centers), np.zeros(5, np.int64))
    assert (rows @ start.centers_CE.numpy().T).argmax(axis=1).max() < 3, "centres 3 and 4 are meant to be empty"
    first = run(lone_group, tmp_path, make_rules(1), start)
    assert first.num_splits == (2,) and first.counts_C[3:].tolist() == [0, 0] and first.counts_C.sum() == 121
    later = run(lone_group, tmp_path, make_rules(6), first)
    assert later.counts_C.min() > 0 and later.num_splits[-1] == 0
    assert torch.allclose(later.centers_CE.norm(dim=1), torch.ones(5), atol=1e-6)
    on_two = run_ranks(run, 2, tmp_path, make_rules(6), start)
    assert torch.equal(on_two[0].centers_CE, on_two[1].centers_CE)
    assert on_two[0].num_splits == later.num_splits
    assert_close("centres", on_two[0].centers_CE, later.centers_CE, 1e-5)


def test_centres_that_may_move_find_a_better_clustering(folder: Path, lone_group: Group, metric: Metric) -> None:
    start_CE = random_centers(EmbeddingStore(folder), lone_group, 60, metric, seed=3)  # of 13, 4 % would be none
    start = Clustering(start_CE, np.zeros(60, np.int64))
    rules = make_rules(60, metric, tolerance=1e-3)
    fixed, moving = (run(lone_group, folder, replace(rules, moving_iterations=n), start) for n in (0, 10))
    assert sum(moving.num_splits) > sum(fixed.num_splits)
    assert moving.num_splits[-2:] == (0, 0) and moving.num_iterations < 60, "it is meant to settle before it ends"
    ends = [module.distortion(done.objective[-1], metric) for done in (fixed, moving)]
    assert ends[1] < ends[0]
    on_two = run_ranks(run, 2, folder, replace(rules, moving_iterations=10), start)[0]
    assert_close("centres", on_two.centers_CE, moving.centers_CE, TOLERANCE)
    assert on_two.num_splits == moving.num_splits
