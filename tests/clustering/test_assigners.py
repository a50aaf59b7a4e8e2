"""Every assigner against the whole matrix of scores in float64."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from itertools import pairwise

import faiss
import pytest
import torch
import torch.nn.functional as F
from distributed_harness import assert_close, assert_differs

from mlcd_ds.clustering import blockwise
from mlcd_ds.clustering.assigner import Assigner, Metric
from mlcd_ds.clustering.blockwise import BlockShape, BlockwiseAssigner
from mlcd_ds.clustering.choose_assigner import (
    MANY_MULTIPLICATIONS,
    choose_assigner,
    describe_assigner,
    resolve_assigner,
    resolve_precision,
)
from mlcd_ds.clustering.faiss_assigner import FaissAssigner
from mlcd_ds.errors import UserError

CPU = torch.device("cpu")
HAS_TRITON = importlib.util.find_spec("triton") is not None  # conftest.py has it interpret its kernels
TOLERANCE = 1e-6  # of the scores; measured 2e-7
NUM_ROWS, DIM = 301, 48


def problem(num_centers: int, metric: Metric) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows near some of the centres; centres of different lengths where lengths matter."""
    generator = torch.Generator().manual_seed(num_centers)
    centers = F.normalize(torch.randn(num_centers, DIM, generator=generator))
    picks = torch.randint(num_centers, (NUM_ROWS,), generator=generator)
    rows = F.normalize(centers[picks] + 0.2 * torch.randn(NUM_ROWS, DIM, generator=generator))
    if metric == "euclidean":
        centers *= 0.5 + torch.rand(num_centers, 1, generator=generator)
    return rows, centers


def scores_of(rows: torch.Tensor, centers: torch.Tensor, metric: Metric) -> torch.Tensor:
    scores = rows.double() @ centers.double().T
    return scores if metric == "cosine" else scores - centers.double().square().sum(dim=1) / 2


def check(
    assigner: Assigner,
    num_centers: int,
    k: int,
    metric: Metric,
    tolerance: float = TOLERANCE,
    of_scores: float = 3e-6,  # measured 1.1e-6
) -> None:
    rows, centers = problem(num_centers, metric)
    assigner.set_centers(centers.flip(0))
    assigner.set_centers(centers)  # replaces
    scores, nearest = assigner.search(rows, k)
    all_scores = scores_of(rows, centers, metric)
    best = all_scores.topk(k, dim=1).values
    assert nearest.dtype == torch.int64 and scores.dtype == torch.float32
    assert all(len(set(row)) == k for row in nearest.tolist())
    # By score and not by number: rounding may swap near ties, and nothing else.
    assert_close("scores of what was found", all_scores.gather(1, nearest), best, tolerance)
    assert_close("scores", scores, all_scores.gather(1, nearest), of_scores)
    assert (scores.diff(dim=1) <= 0).all()
    if k < num_centers:
        wrong = all_scores.gather(1, (nearest + 1) % num_centers)
        assert_differs("the centre beside", wrong, best, tolerance)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("num_centers", [3, 32, 33, 96, 500])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_blockwise_is_exact(num_centers: int, k: int, metric: Metric, monkeypatch: pytest.MonkeyPatch) -> None:
    if k > num_centers:
        pytest.skip("more than there are")
    for rows, centers in ((64, 96), (1, 32), (1000, 512)):
        monkeypatch.setattr(blockwise, "BLOCKS", dict.fromkeys(blockwise.BLOCKS, BlockShape(rows, centers)))
        check(BlockwiseAssigner(metric, False, CPU), num_centers, k, metric)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("k", [1, 8])
def test_bf16_misses_little_and_scores_in_fp32(k: int, metric: Metric, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "BLOCKS", dict.fromkeys(blockwise.BLOCKS, BlockShape(64, 96)))
    check(BlockwiseAssigner(metric, True, CPU), 500, k, metric, tolerance=1e-2)  # measured 3e-3
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16", "only within the search"


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize(("num_centers", "k"), [(3, 1), (33, 8), (100, 1), (100, 20)])
def test_triton_is_exact(num_centers: int, k: int, metric: Metric, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlcd_ds.clustering import triton_nearest

    monkeypatch.setattr(triton_nearest, "BLOCK_ROWS", 200)
    monkeypatch.setattr(triton_nearest, "MEMBER_BYTES", 2**20)
    for is_bf16, tolerance in ((False, TOLERANCE), (True, 1e-2)):
        assigner = choose_assigner("triton", metric, CPU, is_bf16)
        # Small tiles: their edges lie inside of the problem.
        check(replace(assigner, block_b=32, block_c=16, block_e=32), num_centers, k, metric, tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("name", ["faiss", "torch", "triton"])
@pytest.mark.parametrize("is_bf16", [False, True])
def test_on_a_gpu(name: str, metric: Metric, is_bf16: bool) -> None:
    class OnCpu:
        """Hands tensors over and back."""

        def __init__(self) -> None:
            self.inner = choose_assigner(name, metric, torch.device("cuda"), is_bf16)

        def set_centers(self, centers_CE: torch.Tensor) -> None:
            self.inner.set_centers(centers_CE)

        def search(self, rows_BE: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
            scores, nearest = self.inner.search(rows_BE.cuda(), k)
            return scores.cpu(), nearest.cpu()

    for k in (1, 8):
        check(OnCpu(), 500, k, metric, 1e-2 if is_bf16 else 1e-5, 1e-2 if is_bf16 and name == "faiss" else 1e-5)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("k", [1, 8])
def test_faiss_is_exact(k: int, metric: Metric) -> None:
    check(FaissAssigner(metric), 500, k, metric)


def test_all_negative_scores_and_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding must not win over negative scores; equal centres are found once each."""
    monkeypatch.setattr(blockwise, "BLOCKS", dict.fromkeys(blockwise.BLOCKS, BlockShape(8, 32)))
    centers = -torch.ones(35, DIM)
    assigner = BlockwiseAssigner("cosine", False, CPU)
    assigner.set_centers(centers)
    scores, nearest = assigner.search(torch.ones(10, DIM), 35)
    assert sorted(nearest[0].tolist()) == list(range(35)) and (scores == -DIM).all()


def test_no_rows() -> None:
    assigner = BlockwiseAssigner("cosine", False, CPU)
    assigner.set_centers(torch.eye(4))
    scores, nearest = assigner.search(torch.zeros(0, 4, dtype=torch.float16), 3)
    assert scores.shape == nearest.shape == (0, 3)


def test_labels_of_more_centres_are_a_prefix() -> None:
    rows, centers = problem(500, "cosine")
    assigner = BlockwiseAssigner("cosine", False, CPU)
    assigner.set_centers(centers)
    found = [assigner.search(rows, k)[1] for k in (1, 4, 8)]
    assert all(torch.equal(longer[:, : shorter.shape[1]], shorter) for shorter, longer in pairwise(found))


def test_auto_is_bf16_for_large_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert [resolve_precision("auto", CPU, n * MANY_MULTIPLICATIONS) for n in (0.5, 2)] == [False, True]
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not resolve_precision("auto", CPU, 2 * MANY_MULTIPLICATIONS)
    assert resolve_precision("bf16", CPU, 0) and not resolve_precision("fp32", CPU, 1e30)


def test_auto_is_faiss_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(choose_assigner("auto", "cosine", CPU, False), FaissAssigner)
    assert isinstance(choose_assigner("auto", "cosine", CPU, True), BlockwiseAssigner)
    assert describe_assigner("auto", CPU, False) == "faiss, fp32"
    assert describe_assigner("torch", CPU, True) == "torch, bf16"
    gpu = torch.device("cuda")
    monkeypatch.setattr(faiss, "StandardGpuResources", object(), raising=False)
    assert resolve_assigner("auto", gpu, False) == "faiss"
    monkeypatch.delattr(faiss, "StandardGpuResources")
    assert resolve_assigner("auto", gpu, False) == "torch"
    assert describe_assigner("auto", gpu, False) == ('torch, fp32 (no faiss here for cuda: pip install "mlcd_ds[gpu]")')
    for capability, name in (((8, 0), "triton" if HAS_TRITON else "torch"), ((7, 0), "torch")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert resolve_assigner("auto", gpu, True) == name
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert resolve_assigner("auto", CPU, False) == resolve_assigner("auto", gpu, True) == "torch"


def test_faiss_takes_the_threads_that_torch_has() -> None:
    before = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            check(FaissAssigner(), 40, 1, "cosine")
            assert faiss.omp_get_max_threads() == number
    finally:
        torch.set_num_threads(before)


def test_faiss_is_told_of_a_processor_that_its_blas_overlooks(monkeypatch: pytest.MonkeyPatch) -> None:
    name, wanted = "OPENBLAS_CORETYPE", []
    for capability, given in (("AVX512", ""), ("AVX512", "Haswell"), ("AVX2", "")):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        monkeypatch.setenv(name, given)
        if not given:
            monkeypatch.delenv(name)
        FaissAssigner()
        wanted.append(os.environ.get(name))
    assert wanted == ["SkylakeX", "Haswell", None], "what the user says, stays"


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_faiss_finds_all_centres_where_as_many_are_wanted(metric: Metric) -> None:
    check(FaissAssigner(metric), 3, 3, metric)
    for assigner in (FaissAssigner(metric), BlockwiseAssigner(metric, False, CPU)):
        assigner.set_centers(torch.eye(4))
        with pytest.raises(AssertionError):  # faiss would say centre -1
            assigner.search(torch.eye(4), 5)


def test_what_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--precision fp32"):
        choose_assigner("faiss", "cosine", CPU, True)
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert not resolve_precision("auto", gpu, 2 * MANY_MULTIPLICATIONS)
    with pytest.raises(UserError, match=r"--precision bf16 needs a GPU with bf16.*--precision fp32"):
        resolve_precision("bf16", gpu, 0)
    if HAS_TRITON:
        with pytest.raises(UserError, match=r"--assigner triton needs a GPU.*--assigner torch"):
            choose_assigner("triton", "cosine", gpu, False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install triton"):
        choose_assigner("triton", "cosine", CPU, False)
