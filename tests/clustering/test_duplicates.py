"""Near copies: planted ones are found on any number of ranks, and left out of the clustering."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from distributed_harness import run_ranks
from embeddings_maker import all_rows_of, blobs, write_embeddings

from mlcd_ds.clustering import duplicates as module
from mlcd_ds.clustering.center_store import CenterStore
from mlcd_ds.clustering.duplicates import find_duplicates
from mlcd_ds.clustering.embedding_store import EmbeddingStore
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.stages.cluster import Options
from mlcd_ds.stages.cluster import run as cluster_stage
from mlcd_ds.stages.runner import Context

THRESHOLD = 0.98


def run(group: Group, folder: Path) -> np.ndarray:
    return find_duplicates(EmbeddingStore(folder, group.rank, group.size), group, THRESHOLD, seed=0)


def oracle(folder: Path) -> np.ndarray:
    """By all pairs, in float64."""
    rows = all_rows_of(folder)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return np.flatnonzero((np.tril(rows @ rows.T, -1) >= THRESHOLD).any(axis=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows apart from one another, every fifth followed somewhere by a copy, exact or nearly so."""
    path, generator = tmp_path_factory.mktemp("copies"), np.random.default_rng(0)
    rows = np.concatenate(blobs((800,), dim=32, num_blobs=800)).astype(np.float32)
    copies = rows[::5].copy()
    copies[::2] += 0.01 * generator.standard_normal(copies[::2].shape).astype(np.float32)
    rows = np.concatenate([rows, copies, copies[:1].repeat(50, axis=0)])
    rows = generator.permutation(rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    write_embeddings(path, np.split(rows, (301, 302, 420, 420)))
    return path


def test_copies_are_found_on_any_number_of_ranks(folder: Path, lone_group: Group) -> None:
    wanted, alone = oracle(folder), run(lone_group, folder)
    assert len(wanted) >= 209 and np.isin(alone, wanted).all(), "what is found is a copy"
    assert len(alone) >= 0.98 * len(wanted)
    for num_ranks in (2, 3):
        results = run_ranks(run, num_ranks, folder)
        assert all(np.array_equal(result, alone) for result in results)


def test_large_buckets_are_compared_in_parts(folder: Path, lone_group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_COMPARED", 8)
    found = run(lone_group, folder)
    assert np.isin(found, oracle(folder)).all() and len(found) >= 0.95 * len(oracle(folder))


def test_what_is_excluded_is_not_read(folder: Path) -> None:
    all_rows, gone = all_rows_of(folder), np.array([0, 5, 300, 301, 302, 500, 1009])
    seen = []
    for rank in range(3):
        store = EmbeddingStore(folder, rank, 3)
        store.exclude(gone)
        assert store.num_rows == len(all_rows) - 7
        seen += list(store.blocks(64))
    kept = np.setdiff1d(np.arange(len(all_rows)), gone)
    assert np.array_equal(torch.cat([numbers for numbers, _ in seen]), kept)
    assert np.array_equal(torch.cat([rows for _, rows in seen]).double(), all_rows[kept])


def test_any_row_can_be_read(folder: Path) -> None:
    wanted = np.array([1009, 0, 301, 301, 420])
    assert np.array_equal(EmbeddingStore(folder, 1, 3).read(wanted).double(), all_rows_of(folder)[wanted])


def test_the_stage_leaves_copies_out_and_reports_them(folder: Path, tmp_path: Path, lone_group: Group) -> None:
    stores = []
    for name, threshold in (("a", THRESHOLD), ("b", None)):
        options = Options(
            embeddings=folder, out=tmp_path / name, num_centers=10, num_iterations=3, duplicates_above=threshold
        )
        assert cluster_stage(options, Context(lone_group, torch.device("cpu"))) == 0
        stores.append(CenterStore(options.out).manifest)
    without, whole = stores
    assert without.num_duplicates > 200 and whole.num_duplicates == 0
    assert without.num_rows[0] + without.num_duplicates == whole.num_rows[0] == 1010
    assert len(np.load(tmp_path / "a" / "duplicates.npy")) == without.num_duplicates
