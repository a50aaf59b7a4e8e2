"""`mlcd assign` against brute force in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from embeddings_maker import blobs, write_embeddings

from mlcd_ds.artefacts.manifest import read_manifest
from mlcd_ds.clustering import label_pass
from mlcd_ds.clustering.embedding_store import EmbeddingStore
from mlcd_ds.clustering.faiss_assigner import FaissAssigner
from mlcd_ds.clustering.label_pass import label_rows
from mlcd_ds.data.label_store import LabelManifest
from mlcd_ds.stages import assign
from mlcd_ds.stages.cluster import ClusterManifest
from mlcd_ds.stages.cluster import main as cluster

TIE = 2e-6  # similarities closer than this may come in either order; measured rounding: 2e-7


def assert_nearest(labels_NP: np.ndarray, rows_NE: np.ndarray, centers_CE: np.ndarray) -> None:
    """Different centres, nearest first, and none left out is nearer than one that was taken (ties aside)."""
    number, num_labels = labels_NP.shape
    assert number == len(rows_NE)
    similarity_NC = rows_NE.astype(np.float64) @ centers_CE.astype(np.float64).T
    best_NP = -np.sort(-similarity_NC, axis=1)[:, :num_labels]
    got_NP = np.take_along_axis(similarity_NC, labels_NP.astype(np.int64), axis=1)
    assert np.abs(got_NP - best_NP).max() < TIE
    assert all(len(set(row)) == num_labels for row in labels_NP.tolist())


@pytest.fixture
def problem() -> tuple[np.ndarray, np.ndarray]:
    """Rows and centres."""
    generator = np.random.default_rng(0)
    (rows,) = blobs((500,), dim=24, num_blobs=9)
    return rows, F.normalize(torch.from_numpy(generator.standard_normal((40, 24)))).float().numpy()


@pytest.mark.parametrize("num_labels", [1, 8, 40])
def test_labels_are_the_nearest_centres(
    problem: tuple[np.ndarray, np.ndarray], num_labels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, centers = problem
    monkeypatch.setattr(label_pass, "BLOCK_ROWS", 64)
    assigner = FaissAssigner()
    assigner.set_centers(torch.from_numpy(centers).flip(0))
    assigner.set_centers(torch.from_numpy(centers))  # replaces
    labels, similarity = label_rows(assigner, torch.from_numpy(rows), num_labels)
    assert labels.dtype == np.int32 and labels.shape == (500, num_labels)
    assert similarity.dtype == np.float16 and similarity.shape == labels.shape
    exact = (rows.astype(np.float64) @ centers.T.astype(np.float64))[np.arange(500)[:, None], labels]
    assert np.abs(similarity - exact).max() < 6e-4  # half of fp16's last place at 1
    assert_nearest(labels, rows, centers)
    for bad in (np.roll(labels, 1, axis=0), (labels + 1) % 40):
        with pytest.raises(AssertionError):
            assert_nearest(bad, rows, centers)
    if num_labels > 1:
        with pytest.raises(AssertionError):
            assert_nearest(labels[:, ::-1], rows, centers)  # known-bad twin: farthest first


def test_no_rows_give_no_labels() -> None:
    assigner = FaissAssigner()
    assigner.set_centers(torch.eye(4))
    assert [part.shape for part in label_rows(assigner, torch.zeros(0, 4).half(), 3)] == [(0, 3)] * 2


def test_the_stages_label_every_row_of_every_shard(tmp_path: Path) -> None:
    folders = [str(tmp_path / name) for name in ("embeddings", "clusters", "labels")]
    shards = blobs((50, 0, 3, 70), dim=16, num_blobs=6)
    write_embeddings(tmp_path / "embeddings", shards, index="fingerprint of the index")
    arguments = ["--embeddings", folders[0], "--num-centers", "10", "--num-iterations", "4", "--out", folders[1]]
    assert cluster(arguments) == 0
    arguments = ["--embeddings", folders[0], "--clusters", folders[1], "--num-labels", "3", "--out", folders[2]]
    assert assign.main(arguments) == 0
    centers = np.load(tmp_path / "clusters" / "centers.npy")
    assert centers.shape == (10, 16) and np.allclose(np.linalg.norm(centers, axis=1), 1, atol=1e-6)
    manifest = read_manifest(tmp_path / "labels", LabelManifest, "assign")
    assert set(manifest.files) == {"00000.npy", "00002.npy", "00003.npy", "sizes.npy"} | {
        f"similarity/0000{number}.npy" for number in (0, 2, 3)
    }
    assert (manifest.num_images, manifest.num_labels, manifest.num_centers) == (123, 3, 10)
    assert manifest.inputs == {
        "index": "fingerprint of the index",
        "embeddings": EmbeddingStore(tmp_path / "embeddings").manifest.fingerprint,
        "clusters": read_manifest(tmp_path / "clusters", ClusterManifest, "cluster").fingerprint,
    }
    labels = {name: np.load(tmp_path / "labels" / name) for name in manifest.files if "/" not in name}
    sizes = labels.pop("sizes.npy")
    for name, labels_NP in labels.items():
        assert labels_NP.dtype == np.int32
        assert_nearest(labels_NP, shards[int(name[:5])], centers)
    nearest = np.concatenate([labels_NP[:, 0] for labels_NP in labels.values()])
    assert sizes.dtype == np.int64 and np.array_equal(sizes, np.bincount(nearest, minlength=10))


@pytest.mark.parametrize("assigner", ["faiss", "torch"])
def test_a_row_that_is_not_finite_is_named(
    tmp_path: Path, assigner: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folders = [str(tmp_path / name) for name in ("embeddings", "clusters", "labels")]
    shards = blobs((50, 20), dim=16, num_blobs=6)
    write_embeddings(tmp_path / "embeddings", shards)
    assert cluster(["--embeddings", folders[0], "--num-centers", "10", "--out", folders[1]]) == 0
    shards[1][7, 3] = np.nan
    write_embeddings(tmp_path / "embeddings", shards)
    arguments = ["--embeddings", folders[0], "--clusters", folders[1], "--out", folders[2], "--assigner", assigner]
    assert assign.main(arguments) == 2
    assert "00001.npy row 7 has NaN or infinity" in capsys.readouterr().err + caplog.text


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_a_threshold_leaves_the_similar_ones_and_the_nearest(
    problem: tuple[np.ndarray, np.ndarray], metric: str
) -> None:
    rows, centers = problem
    exact = rows.astype(np.float64) @ centers.T.astype(np.float64)
    if metric == "euclidean":
        centers = 2 * centers
        exact = -((rows[:, None].astype(np.float64) - centers) ** 2).sum(axis=2)
    threshold = float(np.quantile(exact, 0.97))
    assigner = FaissAssigner(metric)
    assigner.set_centers(torch.from_numpy(centers))
    labels, similarity = label_rows(assigner, torch.from_numpy(rows), 8, metric, threshold)
    wanted = np.clip((exact >= threshold).sum(axis=1), 1, 8)
    assert (exact.max(axis=1) < threshold).any(), "some rows have nothing near"
    assert (wanted < 8).any() and (wanted > 1).any()
    assert np.array_equal((labels >= 0).sum(axis=1), wanted)
    assert ((labels[:, 1:] < 0) <= (labels[:, :-1] < 0) + (labels[:, 1:] < 0)).all() and (labels[:, 0] >= 0).all()
    assert np.array_equal(labels < 0, np.isneginf(similarity))
    kept = labels >= 0
    got = exact[np.arange(len(rows))[:, None], labels]
    assert np.allclose(similarity[kept], got[kept], rtol=1e-3, atol=1e-3)
    assert (labels[:, 0] == exact.argmax(axis=1)).mean() > 0.99


def test_another_threshold_is_another_work(tmp_path: Path) -> None:
    folders = [str(tmp_path / name) for name in ("embeddings", "clusters", "labels")]
    write_embeddings(tmp_path / "embeddings", blobs((50, 20), dim=16, num_blobs=6))
    assert cluster(["--embeddings", folders[0], "--num-centers", "10", "--out", folders[1]]) == 0
    arguments = ["--embeddings", folders[0], "--clusters", folders[1], "--num-labels", "3", "--out", folders[2]]
    assert assign.main([*arguments, "--threshold", "0.5"]) == 0
    assert assign.main(arguments) == 2 and assign.main([*arguments, "--threshold", "0.6"]) == 2
    assert assign.main([*arguments, "--threshold", "0.5"]) == 0
    labels = np.load(tmp_path / "labels" / "00000.npy")
    assert (labels[:, 0] >= 0).all() and (labels < 0).any()
