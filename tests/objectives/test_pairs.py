"""CLIP's and SigLIP's losses by blocks on several ranks, against dense float64 oracles written from the formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_harness import TensorSizes, assert_close, assert_differs, of_whole_batch, run_ranks
from torch import Tensor

from mlcd_ds.distributed.collectives import Group
from mlcd_ds.kernels.matmul import Matmul
from mlcd_ds.objectives import pairs
from mlcd_ds.objectives.clip import clip_loss
from mlcd_ds.objectives.pair_objective import Scale
from mlcd_ds.objectives.siglip import siglip_loss

DIM, BIAS, SCALES = 6, -3.0, (1.0, 14.0, 100.0)
BLOCK = (4, 5)  # images, texts: neither divides what a rank has
PER_RANK = {1: 13, 2: 7, 3: 5}
# Measured: fp64 1.1e-15. fp32 at scale 100: 5.2e-7.
TOLERANCE, FP32_TOLERANCE = 1e-14, 5e-6


@dataclass(frozen=True)
class Batch:
    """Of all ranks. Some texts are nearly their image, some nearly another's: sums have large and small summands."""

    image_GE: Tensor
    text_GE: Tensor

    def own(self, group: Group) -> tuple[Tensor, Tensor]:
        size = len(self.image_GE) // group.size
        rows = slice(group.rank * size, (group.rank + 1) * size)
        return self.image_GE[rows], self.text_GE[rows]


def make_batch(num_ranks: int, dtype: torch.dtype = torch.float64) -> Batch:
    generator, size = torch.Generator().manual_seed(0), num_ranks * PER_RANK[num_ranks]
    image_GE, noise_GE = (torch.randn(size, DIM, generator=generator, dtype=torch.float64) for _ in range(2))
    text_GE = torch.where(torch.arange(size)[:, None] % 3 > 0, image_GE, image_GE.roll(1, 0)) + 0.5 * noise_GE
    return Batch(F.normalize(image_GE).to(dtype), F.normalize(text_GE).to(dtype))


def oracle(kind: str, batch: Batch, scale: float) -> dict[str, Tensor]:
    """Loss and gradients, from all logits at once."""
    image_GE, text_GE = (rows.double().requires_grad_() for rows in (batch.image_GE, batch.text_GE))
    numbers = torch.tensor([scale, BIAS], dtype=torch.float64, requires_grad=True)
    logits_GG = numbers[0] * image_GE @ text_GE.T
    own_G = torch.arange(len(logits_GG))
    if kind == "clip":
        loss = (F.cross_entropy(logits_GG, own_G) + F.cross_entropy(logits_GG.T, own_G)) / 2
    else:
        signs_GG = 2 * torch.eye(len(own_G), dtype=torch.float64) - 1
        loss = -F.logsigmoid(signs_GG * (logits_GG + numbers[1])).sum(dim=1).mean()
    loss.backward()
    assert image_GE.grad is not None and text_GE.grad is not None and numbers.grad is not None
    found = {"loss": loss.detach(), "image": image_GE.grad, "text": text_GE.grad, "scale": numbers.grad[0]}
    return found if kind == "clip" else found | {"bias": numbers.grad[1]}


class WithoutGradient(Group):
    """The known-bad twin: texts are gathered, and what other ranks make of them is left out of their gradient."""

    def reduce_scatter_sum(self, rows_G: Tensor) -> Tensor:
        size = len(rows_G) // self.size
        return rows_G[self.rank * size : (self.rank + 1) * size].clone()


def compute(group: Group, kind: str, batch: Batch, scale: float, *wanted: str) -> dict[str, Tensor]:
    image_BE, text_BE = batch.own(group)
    numbers = torch.tensor([scale, BIAS], dtype=image_BE.dtype)
    given = pairs.Pairs(image_BE, text_BE, numbers[0], group, Matmul(False, "cpu"), wanted or ("image", "text"))
    parts, gradients = clip_loss(given) if kind == "clip" else siglip_loss(given, numbers[1])
    return {"loss": parts.sum(), **gradients}


def gap_of(group: Group) -> tuple[Tensor, Tensor]:
    """The gap of a batch, and of its known-bad twin, texts on the other side."""
    image_BE, text_BE = make_batch(group.size).own(group)
    scale, matmul = torch.tensor(14.0, dtype=torch.float64), Matmul(False, "cpu")
    right, twin = (pairs.Pairs(image_BE, rows, scale, group, matmul).gap() for rows in (text_BE, -text_BE))
    return right, twin


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_the_gap_is_between_the_means_of_all_ranks(num_ranks: int) -> None:
    batch = make_batch(num_ranks)
    expected = (batch.image_GE.mean(dim=0) - batch.text_GE.mean(dim=0)).norm()
    for right, twin in run_ranks(gap_of, num_ranks):
        assert_close("gap", right, expected, TOLERANCE)
        assert_differs("gap of other texts", twin, expected, 1e-3)


def compute_all(group: Group) -> dict[tuple, dict[str, Tensor]]:
    found, blocks = {}, pairs.BLOCKS["cpu"]
    for kind in ("clip", "siglip"):
        for scale in SCALES:
            for block in (BLOCK, blocks):
                pairs.BLOCKS["cpu"] = block
                found[kind, scale, block == BLOCK] = compute(group, kind, make_batch(group.size), scale)
        found[kind, 100.0, "fp32"] = compute(group, kind, make_batch(group.size, torch.float32), 100.0)
        for wanted in ("image", "text"):
            found[kind, 14.0, wanted] = compute(group, kind, make_batch(group.size), 14.0, wanted)
        twin = WithoutGradient(group.process_group)
        found[kind, 14.0, "without gradient"] = compute(twin, kind, make_batch(group.size), 14.0)
    return found


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_loss_and_gradients_are_the_dense_ones(num_ranks: int) -> None:
    results = run_ranks(compute_all, num_ranks)
    for kind, scale, how in results[0]:
        found = [rank[kind, scale, how] for rank in results]
        got = of_whole_batch(found, ("image", "text"), ("scale", "bias"))
        dtype = torch.float32 if how == "fp32" else torch.float64
        expected = oracle(kind, make_batch(num_ranks, dtype), scale)
        if how in ("image", "text"):  # the other tower is frozen
            del expected["text" if how == "image" else "image"]
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            if how == "without gradient":
                if name == "text" and num_ranks > 1:
                    assert_differs(f"{kind} {name}", got[name], value, 1e-3)
                continue
            tolerance = FP32_TOLERANCE if how == "fp32" else TOLERANCE
            assert_close(f"{kind}, scale {scale}, {how}: {name}", got[name], value, tolerance)


def test_twins_of_the_oracle_are_told_apart() -> None:
    batch = make_batch(2)
    right, shuffled = (
        oracle("clip", Batch(batch.image_GE, text), 14.0) for text in (batch.text_GE, batch.text_GE.roll(1, 0))
    )
    assert_differs("another pairing", shuffled["loss"], right["loss"], 1e-3)
    assert_differs("scale's gradient, twice", 2 * right["scale"], right["scale"], TOLERANCE)


class GatherWithGradient(torch.autograd.Function):
    """torch.distributed.nn.all_gather: backward sums what all ranks give."""

    @staticmethod
    def forward(ctx: object, rows_B: Tensor) -> Tensor:
        parts = [torch.empty_like(rows_B) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows_B.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: object, grad_G: Tensor) -> Tensor:
        grad_G = grad_G.clone()
        dist.all_reduce(grad_G)
        return grad_G.chunk(dist.get_world_size())[dist.get_rank()]


def with_local_logits(group: Group, is_package: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Ours; and open_clip's ClipLoss(local_loss=True, gather_with_grad=True), written here or the package's own, its
    gradients averaged over the ranks."""
    batch = make_batch(group.size)
    ours = compute(group, "clip", batch, 14.0)
    image_BE, text_BE = (rows.clone().requires_grad_() for rows in batch.own(group))
    scale = torch.tensor(14.0, dtype=torch.float64, requires_grad=True)
    if is_package:
        from open_clip.loss import ClipLoss

        theirs_loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=group.rank, world_size=group.size)
        loss = theirs_loss(image_BE, text_BE, scale)
    else:
        image_GE, text_GE = GatherWithGradient.apply(image_BE), GatherWithGradient.apply(text_BE)
        labels_B = torch.arange(len(image_BE)) + group.rank * len(image_BE)
        by_image, by_text = scale * image_BE @ text_GE.T, scale * text_BE @ image_GE.T
        loss = (F.cross_entropy(by_image, labels_B) + F.cross_entropy(by_text, labels_B)) / 2
    loss.backward()
    assert image_BE.grad is not None and text_BE.grad is not None and scale.grad is not None
    theirs = {"image": image_BE.grad / group.size, "text": text_BE.grad / group.size, "scale": scale.grad / group.size}
    for name, value in (("loss", loss.detach() / group.size), ("scale", theirs["scale"])):
        theirs[name] = group.all_reduce_sum(value.clone())
    ours["scale"] = group.all_reduce_sum(ours["scale"].clone())
    return ours, theirs


@pytest.mark.parametrize("is_package", [False, True], ids=["written here", "the package"])
def test_the_loss_is_that_of_open_clip(is_package: bool) -> None:
    if is_package:
        pytest.importorskip("open_clip", reason="the package open_clip_torch is not installed")
    for ours, theirs in run_ranks(with_local_logits, 2, is_package):
        for name, value in theirs.items():
            assert_close(name, ours[name], value, TOLERANCE)


@pytest.mark.parametrize(("first", "bound", "outwards"), [(14.0, 20.0, -0.5), (3.0, 2.0, 0.5)])
def test_the_scale_stays_within_its_bounds_and_comes_back(first: float, bound: float, outwards: float) -> None:
    scale = Scale(first, (2.0, 20.0), bias=-10.0)
    assert [name for name, _ in scale.named_parameters()] == ["log_scale", "bias"]
    optimizer = torch.optim.SGD(scale.parameters(), lr=1.0)
    seen = []
    for slope in (outwards, outwards, -outwards / 5, -outwards / 5):
        optimizer.zero_grad()
        outputs = scale({})
        seen.append(outputs["scale"].item())
        (slope * outputs["scale"].log() + 0.5 * outputs["bias"]).backward()
        optimizer.step()
    assert seen[0] == pytest.approx(first) and seen[1:3] == pytest.approx([bound, bound])
    once = math.log(first) - outwards * (1 - 2 / 5)
    assert scale.log_scale.item() == pytest.approx(once), "it did not run away"
    assert scale({})["bias"].item() == -12.0


def test_no_block_of_logits_stays() -> None:
    """The largest tensor is a block, not [G, G], and nothing is recorded for a backward pass."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = Group(dist.group.WORLD)
        rows = F.normalize(torch.randn(5000, 8))
        numbers = torch.tensor([14.0, -10.0])
        seen = TensorSizes()
        for kind in ("clip", "siglip"):
            given = pairs.Pairs(rows, rows, numbers[0], group, Matmul(False, "cpu"))
            with seen:
                clip_loss(given) if kind == "clip" else siglip_loss(given, numbers[1])
    finally:
        dist.destroy_process_group()
    assert max(seen.sizes) == pairs.BLOCKS["cpu"][0] * pairs.BLOCKS["cpu"][1]
