"""The blocks of both kernels, in every precision, against the whole matrix in float64."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from distributed_harness import assert_close, assert_differs, run_ranks
from torch import Tensor

from mlcd_ds.config import load_recipe
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.errors import UserError
from mlcd_ds.heads import negatives
from mlcd_ds.heads.centers import Centers
from mlcd_ds.heads.choose_exp_block import choose_exp_block
from mlcd_ds.heads.groups import make_head_groups
from mlcd_ds.heads.negatives import BlockShape, Negatives, TorchExpBlock
from mlcd_ds.heads.partial_fc import HeadConfig, PartialFCHead
from mlcd_ds.kernels.matmul import Matmul
from mlcd_ds.objectives.class_centres import ClassCentres, head_config
from mlcd_ds.objectives.class_losses import ClassLoss, ClassLossConfig

NUM_IMAGES, NUM_CLASSES, NUM_SAMPLED, DIM, NUM_LABELS = 19, 60, 43, 24, 3
SHIFT = 8.0
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
HAS_TRITON = importlib.util.find_spec("triton") is not None  # conftest.py has it interpret its kernels
KERNELS = [
    "torch",
    pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")),
]
# Relative to the largest entry; measured 2.2e-7 (fp32), 1.2e-15 (float64), 1.5e-2 (bf16: with so few dimensions its
# rounding of a cosine hardly averages out; benchmarks/head.py measures it at real sizes).
TOLERANCES = {"fp32": 2e-6, "bf16": 3e-2, "float64": 1e-13}


def make_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Unit embeddings, centres, sampled rows, slots of own labels (some not sampled), factors."""
    generator = torch.Generator().manual_seed(2)
    emb_GE = F.normalize(torch.randn(NUM_IMAGES, DIM, generator=generator, dtype=dtype), dim=1)
    weight_LE = torch.randn(NUM_CLASSES, DIM, generator=generator, dtype=dtype)
    rows_S = torch.randperm(NUM_CLASSES, generator=generator)[:NUM_SAMPLED].sort().values
    slots_GP = torch.randint(-1, NUM_SAMPLED, (NUM_IMAGES, NUM_LABELS), generator=generator)
    slots_GP[0] = torch.tensor([0, 0, NUM_SAMPLED - 1])  # an edge, and one column named twice
    slots_GP[1] = -1
    return emb_GE, weight_LE, rows_S, slots_GP, torch.rand(NUM_IMAGES, generator=generator, dtype=dtype)


def in_blocks(
    kernel: str,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
    block: BlockShape,
    filtered_above: float | None = None,
) -> dict[str, Tensor]:
    """Both passes in blocks of a given shape."""
    monkeypatch.setitem(negatives.BLOCKS, "cpu", block)
    dtype = torch.float64 if precision == "float64" else torch.float32
    emb_GE, weight_LE, rows_S, slots_GP, factors_G = make_inputs(dtype)
    matmul = Matmul(precision == "bf16", "cpu")
    exp_block = choose_exp_block(kernel, matmul, CPU, filtered_above)
    if kernel == "triton":  # small tiles: their edges lie inside of a block
        exp_block = replace(exp_block, block_g=16, block_s=16, block_e=16)
    grad_LE = torch.zeros_like(weight_LE)
    parts = Negatives(Centers(weight_LE, grad_LE), rows_S, slots_GP, 16.0, SHIFT, exp_block, matmul)
    with matmul.active():
        sums_G, slopes_GE = parts.sums(emb_GE)
        parts.add_row_gradients(emb_GE, factors_G)
    return {"sums": sums_G, "slopes": slopes_GE, "grad": grad_LE}


def at_once(
    dtype: torch.dtype = torch.float32, *, mask_own: bool = True, filtered_above: float = math.inf
) -> dict[str, Tensor]:
    """The same from the whole matrix of logits, by autograd in float64, of inputs made in `dtype`."""
    emb_GE, weight_LE, rows_S, slots_GP, factors_G = make_inputs(dtype)
    emb_GE, weight_LE, factors_G = emb_GE.double(), weight_LE.double(), factors_G.double()
    emb_GE.requires_grad_(), weight_LE.requires_grad_()
    z_GS = 16.0 * emb_GE @ F.normalize(weight_LE[rows_S], dim=1).T
    z_GS = z_GS.where(z_GS <= filtered_above, 0.0)
    own_GS = torch.zeros(NUM_IMAGES, NUM_SAMPLED + 1, dtype=torch.bool)
    own_GS.scatter_(1, slots_GP.where(slots_GP >= 0, NUM_SAMPLED), True)
    exp_GS = torch.exp(z_GS - SHIFT)
    sums_G = (exp_GS.masked_fill(own_GS[:, :-1], 0.0) if mask_own else exp_GS).sum(dim=1)
    (slopes_GE,) = torch.autograd.grad(sums_G.sum(), emb_GE, retain_graph=True)
    (grad_LE,) = torch.autograd.grad((sums_G * factors_G).sum(), weight_LE)
    return {"sums": sums_G.detach(), "slopes": slopes_GE, "grad": grad_LE}


@pytest.mark.parametrize("block", [BlockShape(7, 11), BlockShape(64, 64), BlockShape(19, 43)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_blocks_add_up_to_the_whole(
    kernel: str, precision: str, block: BlockShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    got, expected, unmasked = in_blocks(kernel, precision, monkeypatch, block), at_once(), at_once(mask_own=False)
    for name, tensor in got.items():
        assert_close(name, tensor, expected[name], TOLERANCES[precision])
        # A known-bad twin at the tolerance of fp32: bf16's rounding is not much smaller than one label of forty.
        assert_differs(f"{name}, own labels as negatives", tensor, unmasked[name], 3e-3)


def test_blocks_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    got = in_blocks("torch", "float64", monkeypatch, BlockShape(7, 11))
    for name, expected in at_once(torch.float64).items():
        assert_close(name, got[name], expected, TOLERANCES["float64"])


def clear_limit() -> float:
    """Between two logits that are far enough apart that bf16 does not bring one to the other's side."""
    emb_GE, weight_LE, rows_S, _, _ = make_inputs(torch.float32)
    logits = (16.0 * emb_GE @ F.normalize(weight_LE[rows_S], dim=1).T).flatten().sort().values
    candidates = logits[(logits > 5.0) & (logits < 7.0)]
    widest = int(candidates.diff().argmax())
    limit = float(candidates[widest : widest + 2].mean())
    assert candidates.diff()[widest] > 0.1 and (logits > limit).sum() > 5
    return limit


@pytest.mark.parametrize(("precision", "block"), [("fp32", BlockShape(7, 11)), ("bf16", BlockShape(64, 64))])
def test_a_filtered_logit_counts_as_zero_and_has_no_gradient(
    precision: str, block: BlockShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = clear_limit()
    got, expected = in_blocks("auto", precision, monkeypatch, block, limit), at_once(filtered_above=limit)
    twins = {"no filter": at_once(), "own labels": at_once(filtered_above=limit, mask_own=False)}
    for name, tensor in got.items():
        assert_close(name, tensor, expected[name], TOLERANCES[precision])
        for twin, wrong in twins.items():
            assert_differs(f"{name}, {twin}", tensor, wrong[name], 3e-3)


def test_auto_filters_with_torch_and_triton_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    block = choose_exp_block("auto", Matmul(True, "cuda"), GPU, 48.0)
    assert isinstance(block, TorchExpBlock) and block.filtered_above == 48.0
    message = r"head.kernel is triton, .*objective.similarity_filter: set head.kernel=auto, or objective.similarity_f"
    with pytest.raises(UserError, match=message):
        choose_exp_block("triton", Matmul(True, "cuda"), GPU, 48.0)
    recipe = load_recipe("vit_l_14", ("head.kernel=triton", "objective.similarity_filter=0.75"))
    with pytest.raises(UserError, match=message):
        ClassCentres.check_device(recipe, CPU)


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_triton_refuses_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="float64"):
        in_blocks("triton", "float64", monkeypatch, BlockShape(7, 11))


def test_bf16_rounds_what_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded = in_blocks("torch", "bf16", monkeypatch, BlockShape(64, 64))
    exact = in_blocks("torch", "fp32", monkeypatch, BlockShape(64, 64))
    assert_differs("sums", rounded["sums"], exact["sums"], TOLERANCES["fp32"])
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16", "only within `active`"


def test_auto_takes_torch_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(choose_exp_block("auto", Matmul(False, "cpu"), CPU), TorchExpBlock)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert isinstance(choose_exp_block("auto", Matmul(True, "cuda"), GPU), TorchExpBlock)
    with pytest.raises(UserError, match="pip install triton"):
        choose_exp_block("triton", Matmul(True, "cuda"), GPU)


# What a head takes on GPUs of a compute capability, by the backbone's precision: its own, and the kernel.
ON_GPUS = [
    ((7, 0), "fp16", "fp32", "torch"),
    ((7, 0), "fp32", "fp32", "torch"),
    ((8, 0), "fp16", "bf16", "triton"),
    ((9, 0), "bf16", "bf16", "triton"),
    ((9, 0), "fp32", "fp32", "torch"),
]


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize(("capability", "backbone", "precision", "kernel"), ON_GPUS)
def test_auto_takes_what_the_gpu_can(
    capability: tuple[int, int], backbone: str, precision: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = head_config(load_recipe("vit_l_14", (f"train.precision={backbone}",)), GPU)
    block = choose_exp_block(config.kernel, Matmul(config.precision == "bf16", "cuda"), GPU)
    assert (config.precision, isinstance(block, TorchExpBlock)) == (precision, kernel == "torch")


def test_what_a_gpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    with pytest.raises(UserError, match=r"head.precision bf16 needs a GPU with bf16.*head.precision=fp32"):
        head_config(load_recipe("vit_l_14", ("head.precision=bf16",)), GPU)
    if HAS_TRITON:
        with pytest.raises(UserError, match=r"head.kernel triton needs a GPU, Ampere"):
            choose_exp_block("triton", Matmul(False, "cuda"), GPU)


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_exp_block("triton", Matmul(True, "cpu"), CPU), "tests run under TRITON_INTERPRET=1"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UserError, match=r"head.kernel is triton, but this process sees no GPU: set head.kernel=auto"):
        choose_exp_block("triton", Matmul(True, "cpu"), CPU)


def run_precisions(group: Group) -> dict[str, dict[str, Tensor]]:
    """Features of each type at s = 64, aligned with their centres (cosines of 1 and -1) or random."""
    results = {}
    for precision in ("fp32", "bf16"):
        loss = ClassLoss(ClassLossConfig(scale=64.0))
        config = HeadConfig(sample_rate=1.0, init_std=1.0, precision=precision)
        head = PartialFCHead(NUM_CLASSES, DIM, config, loss, make_head_groups(group), 3)
        head.init_weights()
        head.resample(0)
        weight_CE = torch.cat(group.gather_objects(head.weight_LE.detach()))
        labels_BP = torch.arange(12)[:, None] + torch.tensor([0, 20])
        signs = torch.tensor([1.0, -1.0]).repeat(6)[:, None]
        for kind, rows in {"aligned": weight_CE[:12] * signs, "random": weight_CE[:12].flip(0).roll(1, 1)}.items():
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                head.grad_LE.zero_()
                output = head(F.normalize(rows.to(dtype).float(), dim=1), labels_BP)
                name = f"{precision} {kind} {dtype}"
                results[name] = {"loss": output.loss, "emb": output.emb_grad_BE, "grad": head.grad_LE.clone()}
    return results


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_features_of_every_type_stay_finite_at_scale_64(num_ranks: int) -> None:
    for rank in run_ranks(run_precisions, num_ranks):
        assert len(rank) == 12
        for name, result in rank.items():
            assert all(torch.isfinite(tensor).all() for tensor in result.values()), name
            exact = rank[f"fp32 {name.split(' ', 1)[1]}"]
            if name.startswith("bf16"):
                assert_close(name, result["loss"], exact["loss"], 1e-2)  # measured 2e-4
                assert_close(name, result["emb"], exact["emb"], 1e-1)  # s = 64 makes bf16's 4e-3 large in an exponent
                assert_differs(name, result["grad"], exact["grad"], 1e-7)
