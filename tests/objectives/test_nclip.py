"""nCLIP's loss by blocks of rows on several ranks, against a dense float64 oracle written from the formulas."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_harness import TensorSizes, assert_close, assert_differs, of_whole_batch, run_ranks
from pair_runs import own_tokenizer, pair_recipe
from torch import Tensor

from mlcd_ds.config import Recipe
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.distributed.groups import ParallelGroups
from mlcd_ds.objectives import pseudo_labels
from mlcd_ds.objectives.base import Given
from mlcd_ds.objectives.nclip import Nclip

DIMS, WIDTH, EMBED = 37, 9, 20  # EMBED: as in pair_runs
PER_RANK = {1: 13, 2: 7, 3: 5}
BLOCK = 4 * DIMS + 1  # four rows: they divide nothing that a rank has
# Measured: fp64 2.3e-15. fp32 3e-6 of the largest entry.
TOLERANCE, FP32_TOLERANCE = 2e-14, 2e-5
TERMS = {"cross_entropy_weight": 0.9, "entropy_weight": 0.4, "mean_entropy_weight": 1.3}
KEYS = {**TERMS, "num_dims": DIMS, "head_width": WIDTH, "image_temperature": 0.3, "text_temperature": 0.2}
HEADS = [f"nclip_{tower}_{part}" for tower in ("image", "text") for part in ("first", "bias", "last")]


def make_recipe(**sections: dict[str, Any]) -> Recipe:
    return pair_recipe(Path("runs/none"), "nclip", own_tokenizer(), objective=KEYS, **sections)


def make_outputs(num_ranks: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of all ranks: embeddings that are alike in pairs, and heads that are not as they were at first."""
    generator, size = torch.Generator().manual_seed(0), num_ranks * PER_RANK[num_ranks]
    image_GE, noise_GE = (torch.randn(size, EMBED, generator=generator, dtype=torch.float64) for _ in range(2))
    outputs = {"image": F.normalize(image_GE), "text": F.normalize(image_GE + 0.5 * noise_GE)}
    module = Nclip.engine_module(make_recipe()).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    outputs |= module(outputs)
    return {name: tensor.detach().to(dtype) for name, tensor in outputs.items()}


def oracle(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss and gradients, from both distributions as a whole."""
    leaves = {name: tensor.double().requires_grad_() for name, tensor in outputs.items()}
    probabilities = []
    for tower, temperature in (("image", 0.3), ("text", 0.2)):
        first, bias, last = (leaves[f"nclip_{tower}_{part}"] for part in ("first", "bias", "last"))
        probabilities.append((F.gelu(leaves[tower] @ first.T + bias) @ last.T / temperature).softmax(dim=1))
    p, q = probabilities
    cross = -(q * p.log() + p * q.log()).sum(dim=1).mean() / 2
    own = -(p * p.log() + q * q.log()).sum(dim=1).mean() / 2
    means = [each.mean(dim=0) for each in probabilities]
    of_means = -sum((mean * mean.log()).sum() for mean in means) / 2
    assert isinstance(of_means, Tensor)
    weights = TERMS.values()
    loss = sum(term * weight for term, weight in zip((cross, own, -of_means), weights, strict=True))
    assert isinstance(loss, Tensor)
    loss.backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert gradients.keys() == leaves.keys()
    entropies = {f"entropy_{n}": -(mean * mean.log()).sum().detach() for n, mean in enumerate(means)}
    return {"loss": loss.detach(), **entropies, **gradients}


class WithoutGradient(Group):
    """The known-bad twin: each rank takes the mean distribution of its own images."""

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        return values.mul_(self.size)


def compute(group: Group, outputs: dict[str, Tensor], recipe: Recipe | None = None) -> dict[str, Tensor]:
    size = PER_RANK[group.size]
    rows = slice(group.rank * size, (group.rank + 1) * size)
    own = {name: tensor if name in HEADS else tensor[rows] for name, tensor in outputs.items()}
    objective = Nclip(recipe or make_recipe(), SimpleNamespace(), ParallelGroups(group), torch.device("cpu"))  # type: ignore[arg-type]
    given = objective(own, {})
    assert sum(given.parts.values()) == pytest.approx(given.loss)
    measures = objective.step(0.0)
    entropies = {f"entropy_{n}": measures[f"nclip/mean_entropy_{tower}"] for n, tower in enumerate(objective.towers)}
    return {"loss": given.loss, **entropies, **given.gradients}


def compute_all(group: Group) -> dict[str, dict[str, Tensor]]:
    outputs, whole = make_outputs(group.size, torch.float64), pseudo_labels.BLOCK["cpu"]
    found, pseudo_labels.LEAST_ROWS = {}, 1
    for block in (BLOCK, whole):
        pseudo_labels.BLOCK["cpu"] = block
        found[f"blocks of {block}"] = compute(group, outputs)
    found["fp32"] = compute(group, {name: tensor.float() for name, tensor in outputs.items()})
    found["own mean"] = compute(WithoutGradient(group.process_group), outputs)
    found["frozen image"] = compute(group, outputs, make_recipe(towers={"image": "frozen"}, train={"init_from": "x"}))
    return found


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_loss_and_gradients_are_the_dense_ones(num_ranks: int) -> None:
    results = run_ranks(compute_all, num_ranks)
    for how in results[0]:
        found = [rank[how] for rank in results]
        if how == "own mean":  # of which the loss is each rank's own
            found = [{name: rank[name] for name in HEADS} for rank in found]
        got = of_whole_batch(found, ("image", "text"), HEADS)
        expected = oracle(make_outputs(num_ranks, torch.float32 if how == "fp32" else torch.float64))
        if how == "frozen image":
            del expected["image"]
        if how == "own mean":
            for name in HEADS if num_ranks > 1 else ():
                assert_differs(f"{name}, own mean", got[name], expected[name], 1e-4)
            continue
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert_close(f"{how}: {name}", got[name], value, FP32_TOLERANCE if how == "fp32" else TOLERANCE)


@pytest.fixture
def group() -> Iterator[Group]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Group(dist.group.WORLD)  # type: ignore[arg-type]
    dist.destroy_process_group()


def test_no_block_of_logits_stays(group: Group) -> None:
    """The largest tensor is a block, and not [B, K]."""
    hidden = torch.randn(600, 4), torch.randn(600, 4)
    weights = torch.randn(20_000, 4), torch.randn(20_000, 4)
    matmul = Nclip(make_recipe(), SimpleNamespace(), ParallelGroups(group), torch.device("cpu")).matmul  # type: ignore[arg-type]
    with TensorSizes() as seen:
        pseudo_labels.pseudo_labels(hidden, weights, (1.0, 1.0), pseudo_labels.TermWeights(1, 1, 1), group, matmul)
    assert 600 * 20_000 > pseudo_labels.BLOCK["cpu"] >= max(seen.sizes) > pseudo_labels.BLOCK["cpu"] // 2


def test_a_collapse_is_told_once(group: Group, caplog: pytest.LogCaptureFixture) -> None:
    """All images in one dimension: the mean's entropy is 0. A mean over all dimensions is no collapse."""
    objective = Nclip(make_recipe(), SimpleNamespace(), ParallelGroups(group), torch.device("cpu"))  # type: ignore[arg-type]
    outputs = make_outputs(1, torch.float32)
    with caplog.at_level(logging.WARNING, "mlcd_ds"):
        objective(outputs, {})
        objective.take_counts()
        assert not caplog.records
        outputs["nclip_text_last"] = torch.zeros(DIMS, WIDTH).index_fill_(0, torch.tensor([3]), 1000.0)
        outputs["nclip_text_bias"] = torch.ones(WIDTH) * 9
        given = objective(outputs, {})
        for _ in range(2):
            assert objective.take_counts() == {}
    assert [f"at most {math.log(DIMS):.2f}" in record.getMessage() for record in caplog.records] == [True]
    assert "text tower" in caplog.text and "nclip's mean_entropy_weight" in caplog.text
    measures = objective.step(0.0)
    assert measures["nclip/mean_entropy_text"] < 1e-3 < measures["nclip/mean_entropy_image"]
    assert measures["nclip/dead_dims_text"] == pytest.approx(1 - 1 / DIMS)
    assert isinstance(given, Given) and all(gradient.isfinite().all() for gradient in given.gradients.values())
