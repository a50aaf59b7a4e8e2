"""K-means over ranks against a float64 oracle and against faiss; resuming; what it refuses. Real faiss, real gloo."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from distributed_harness import assert_close, assert_differs, run_ranks
from embeddings_maker import blobs, write_embeddings

from mlcd_ds.clustering import kmeans as module
from mlcd_ds.clustering.assigners import FaissAssigner
from mlcd_ds.clustering.embedding_store import EmbeddingStore, slice_bounds
from mlcd_ds.clustering.kmeans import Clustering, initial_clustering, kmeans, split_largest, unit
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.errors import UserError

NUM_CENTERS = 12
TOLERANCE = 1e-6  # measured: 5e-8 between 1, 2 and 3 ranks, 8e-8 to float64
SHARDS = (301, 1, 118, 0, 402)  # divides by neither 2 nor 3


def run(
    group: Group, folder: Path, num_iterations: int, start: Clustering | None = None, num_centers: int = NUM_CENTERS
) -> Clustering:
    store = EmbeddingStore(folder, group.rank, group.size)
    begin = start or initial_clustering(store, group, num_centers, seed=3)
    return kmeans(store, group, FaissAssigner(store.dim, use_gpu=False), begin, num_iterations, 3, lambda _: None)


def tensors(clustering: Clustering) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(clustering.centers_CE), torch.tensor(clustering.objective)


def oracle(rows_NE: np.ndarray, start_CE: np.ndarray, num_iterations: int, normalise: bool = True) -> Clustering:
    """Spherical Lloyd in float64, row by row. No cluster may become empty."""
    centers, objective = start_CE.astype(np.float64), []
    for _ in range(num_iterations):
        similarity = rows_NE @ centers.T
        nearest = similarity.argmax(axis=1)
        objective.append(similarity.max(axis=1).mean())
        counts = np.bincount(nearest, minlength=len(centers))
        assert counts.min() > 0, "the data is meant to fill all clusters"
        means = np.stack([rows_NE[nearest == center].mean(axis=0) for center in range(len(centers))])
        centers = means / np.linalg.norm(means, axis=1, keepdims=True) if normalise else means
    return Clustering(centers, counts, tuple(objective))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embeddings")
    write_embeddings(path, blobs(SHARDS, dim=24, num_blobs=9))
    return path


@pytest.fixture(scope="module")
def all_rows(folder: Path) -> np.ndarray:
    """All rows, as stored, in float64."""
    return np.concatenate(list(EmbeddingStore(folder).blocks(1000))).astype(np.float64)


@pytest.fixture(scope="module")
def on_one_rank(folder: Path, lone_group: Group) -> Clustering:
    return run(lone_group, folder, 5)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_every_number_of_ranks_gives_the_same(folder: Path, on_one_rank: Clustering, num_ranks: int) -> None:
    results = run_ranks(run, num_ranks, folder, 5)
    for other in results[1:]:
        assert np.array_equal(other.centers_CE, results[0].centers_CE), "the ranks hold different centres"
    for name, got, wanted in zip(("centres", "objective"), tensors(results[0]), tensors(on_one_rank), strict=True):
        assert_close(name, got, wanted, TOLERANCE)
    assert np.array_equal(results[0].counts_C, on_one_rank.counts_C)
    assert results[0].num_splits == on_one_rank.num_splits == (0,) * 5


def test_five_iterations_are_those_of_the_float64_oracle(
    folder: Path, on_one_rank: Clustering, all_rows: np.ndarray, lone_group: Group
) -> None:
    start = run(lone_group, folder, 0)
    assert np.isin(start.centers_CE.round(6), unit(all_rows.astype(np.float32)).round(6)).all()
    wanted = oracle(all_rows, start.centers_CE, 5)
    for name, got, expected in zip(("centres", "objective"), tensors(on_one_rank), tensors(wanted), strict=True):
        assert_close(name, got, expected, TOLERANCE)
    assert np.array_equal(on_one_rank.counts_C, wanted.counts_C) and on_one_rank.counts_C.sum() == len(all_rows)
    # Known-bad twins: one iteration fewer; a rank's last row lost; centres not normalised.
    for bad in (
        oracle(all_rows, start.centers_CE, 4),
        oracle(all_rows[:-1], start.centers_CE, 5),
        oracle(all_rows, start.centers_CE, 5, normalise=False),
    ):
        assert_differs("centres", tensors(on_one_rank)[0], tensors(bad)[0], TOLERANCE)


def test_the_objective_rises_and_is_that_of_faiss(folder: Path, all_rows: np.ndarray, lone_group: Group) -> None:
    start, ours = run(lone_group, folder, 0), run(lone_group, folder, 20)
    rows = np.ascontiguousarray(all_rows, dtype=np.float32)
    theirs = faiss.Kmeans(rows.shape[1], NUM_CENTERS, niter=20, spherical=True, max_points_per_centroid=10**6)
    theirs.train(rows, init_centroids=start.centers_CE.copy())

    def objective(centers_CE: np.ndarray) -> float:
        return float((all_rows @ centers_CE.T.astype(np.float64)).max(axis=1).mean())

    assert objective(ours.centers_CE) == pytest.approx(objective(theirs.centroids), rel=0.005)
    assert (np.diff(ours.objective) > -1e-6).all() and ours.objective[-1] > ours.objective[0] + 0.01
    assert objective(ours.centers_CE) >= ours.objective[-1] - 1e-6
    assert objective(start.centers_CE) < 0.995 * objective(theirs.centroids), "known-bad twin: the start would pass"


def test_resuming_is_bitwise_the_same_and_works_on_other_ranks(
    folder: Path, on_one_rank: Clustering, lone_group: Group
) -> None:
    half = run(lone_group, folder, 2)
    on = run(lone_group, folder, 5, half)
    assert np.array_equal(on.centers_CE, on_one_rank.centers_CE) and np.array_equal(on.counts_C, on_one_rank.counts_C)
    assert on.objective == on_one_rank.objective and on.num_splits == on_one_rank.num_splits
    for name, got, wanted in zip(
        ("centres", "objective"), tensors(run_ranks(run, 2, folder, 5, half)[0]), tensors(on_one_rank), strict=True
    ):
        assert_close(name, got, wanted, TOLERANCE)


def test_blocks_do_not_change_the_result(
    folder: Path, on_one_rank: Clustering, monkeypatch: pytest.MonkeyPatch, lone_group: Group
) -> None:
    monkeypatch.setattr(module, "BLOCK_ROWS", 7)
    assert_close("centres", tensors(run(lone_group, folder, 5))[0], tensors(on_one_rank)[0], TOLERANCE)


# Empty clusters


def test_empty_clusters_are_split_from_the_largest_and_reported(tmp_path: Path, lone_group: Group) -> None:
    write_embeddings(tmp_path, blobs((60, 61), dim=8, num_blobs=3))
    rows = np.concatenate(list(EmbeddingStore(tmp_path).blocks(1000)))
    far = np.zeros((2, 8), np.float32)
    far[:, 0] = -1.0
    far[:, 1] = (0.0, 1e-3)
    start = Clustering(unit(np.concatenate([unit(rows[:3]), far - 10 * rows.mean(axis=0)])), np.zeros(5, np.int64))
    assert (rows @ start.centers_CE.T).argmax(axis=1).max() < 3, "centres 3 and 4 are meant to be empty"
    first = run(lone_group, tmp_path, 1, start)
    assert first.num_splits == (2,) and first.counts_C[3:].tolist() == [0, 0] and first.counts_C.sum() == 121
    later = run(lone_group, tmp_path, 6, first)
    assert later.counts_C.min() > 0 and later.num_splits[-1] == 0
    assert np.allclose(np.linalg.norm(later.centers_CE, axis=1), 1, atol=1e-6)
    on_two = run_ranks(run, 2, tmp_path, 6, start)
    assert np.array_equal(on_two[0].centers_CE, on_two[1].centers_CE)
    assert on_two[0].num_splits == later.num_splits
    assert_close("centres", tensors(on_two[0])[0], tensors(later)[0], 1e-5)


def test_split_largest_takes_the_largest_each_time() -> None:
    centers = unit(np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32))
    before, counts = centers.copy(), np.array([10, 0, 100, 0, 30])
    assert split_largest(centers, counts, np.random.default_rng(1)) == 2
    assert sorted(counts.tolist()) == [10, 25, 25, 30, 50] and counts.sum() == 140
    assert np.array_equal(centers[[0, 4]], before[[0, 4]])
    for center in (1, 2, 3):
        assert 0 < np.linalg.norm(centers[center] - before[2]) < 5e-3
    assert np.linalg.norm(centers[1] - centers[2]) > 1e-4
    unchanged = centers.copy()
    assert split_largest(centers, counts, np.random.default_rng(1)) == 0 and np.array_equal(centers, unchanged)


# The store


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7, 900])
def test_slices_cover_all_rows_once(folder: Path, all_rows: np.ndarray, num_ranks: int) -> None:
    bounds = [slice_bounds(len(all_rows), num_ranks, rank) for rank in range(num_ranks)]
    assert bounds[0][0] == 0 and bounds[-1][1] == len(all_rows)
    assert all(end == begin for (_, end), (begin, _) in pairwise(bounds))
    sizes = [end - begin for begin, end in bounds]
    assert max(sizes) - min(sizes) <= 1
    if num_ranks > 7:
        return
    stores = [EmbeddingStore(folder, rank, num_ranks) for rank in range(num_ranks)]
    blocks = [block for store in stores for block in store.blocks(64)]
    assert np.array_equal(np.concatenate(blocks), all_rows.astype(np.float32)) and max(map(len, blocks)) <= 64
    wanted = np.array([0, 300, 301, 302, 419, 420, 821, 5])
    assert np.array_equal(sum(store.pick(wanted) for store in stores), all_rows[wanted].astype(np.float32))


def test_a_damaged_embedding_shard_is_named(tmp_path: Path) -> None:
    write_embeddings(tmp_path, blobs((20, 20), dim=8, num_blobs=2))
    path = tmp_path / "00001.npy"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    for damage, match in ((bytes(content), "checksum"), (bytes(content[:-2]), "bytes"), (None, "missing")):
        path.unlink() if damage is None else path.write_bytes(damage)
        with pytest.raises(UserError, match=rf"00001\.npy.*{match}.*mlcd embed --overwrite"):
            EmbeddingStore(tmp_path)
        EmbeddingStore(tmp_path, 0, 2)  # the rank that does not read it


def test_more_centres_than_images_are_refused(tmp_path: Path, lone_group: Group) -> None:
    write_embeddings(tmp_path, blobs((3, 4), dim=8, num_blobs=2))
    with pytest.raises(UserError, match="--num-centers 8 is more than the 7 images"):
        run(lone_group, tmp_path, 1, num_centers=8)
    assert run(lone_group, tmp_path, 1, num_centers=7).objective[0] == pytest.approx(1, abs=1e-3)


def test_the_seed_chooses_the_start(folder: Path, lone_group: Group) -> None:
    store = EmbeddingStore(folder)
    one, same, other = (initial_clustering(store, lone_group, 50, seed).centers_CE for seed in (0, 0, 1))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    assert len(np.unique(one, axis=0)) == 50
