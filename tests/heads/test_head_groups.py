"""Head groups with replicas, and tensor-parallel backbones: the same gradients and norm as one process has."""

from __future__ import annotations

import functools

import pytest
import torch
from distributed_harness import assert_close, assert_differs, run_ranks
from torch import Tensor

from mlcd_ds.distributed.collectives import Group
from mlcd_ds.errors import UserError
from mlcd_ds.heads.groups import HeadGroups, make_head_groups
from mlcd_ds.heads.partial_fc import HeadConfig, PartialFCHead
from mlcd_ds.heads.row_optimizer import RowOptimizer, SGDRule
from mlcd_ds.objectives.class_losses import ClassLoss, ClassLossConfig

NUM_CLASSES, DIM, GLOBAL_BATCH, NUM_LABELS = 37, 8, 24, 3
# (ranks, head.parallel_size, tensor parallel size)
LAYOUTS = [(2, 1, 1), (2, 2, 2), (3, 1, 1), (4, 2, 1), (4, 4, 2), (4, 2, 2)]
TOLERANCE = 5e-6  # fp32 in another order: measured 6e-7


def make_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    emb_GE = torch.nn.functional.normalize(torch.randn(GLOBAL_BATCH, DIM, generator=generator), dim=1)
    return emb_GE, torch.randint(NUM_CLASSES, (GLOBAL_BATCH, NUM_LABELS), generator=generator)


def one_step(group: Group, head_parallel: int | None, tensor_parallel: int, mistake: str = "") -> dict[str, Tensor]:
    """Loss, gradients, norm and weights after one step of this rank in a layout; `mistake` makes one on the way."""
    groups = make_head_groups(group, head_parallel, tensor_parallel)
    config = HeadConfig(sample_rate=1.0, init_std=1.0, parallel_size=head_parallel)
    head = PartialFCHead(NUM_CLASSES, DIM, config, ClassLoss(ClassLossConfig(scale=16.0)), groups, seed=3)
    head.init_weights()
    head.resample(0)
    emb_GE, labels_GP = make_batch()
    number, count = group.rank // tensor_parallel, group.size // tensor_parallel
    if mistake == "another's images":
        emb_GE = emb_GE.flip(0)
    emb_BE, labels_BP = emb_GE.tensor_split(count)[number], labels_GP.tensor_split(count)[number]
    output = head(emb_BE, labels_BP)
    if mistake != "no sum over replicas":
        head.finish_gradient()
    grad_LE = head.grad_LE.clone()
    replicas, head.groups = head.groups, HeadGroups(groups.classes, groups.data)  # the sum is already made
    norm = RowOptimizer(head, SGDRule(0.9, 0.0), 0.5, is_lazy=True).step(0.1)
    head.groups = replicas
    return {
        "part": torch.tensor([number, head.classes.begin]),
        "loss": output.loss,
        "emb_grad": output.emb_grad_BE,
        "grad": grad_LE,
        "norm": norm,
        "weight": head.weight_LE.detach(),
    }


@functools.cache
def alone() -> dict[str, Tensor]:
    return run_ranks(one_step, 1, None, 1)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_computes_what_one_process_does(layout: tuple[int, int, int]) -> None:
    num_ranks, head_parallel, tensor_parallel = layout
    expected = alone()
    ranks = run_ranks(one_step, num_ranks, head_parallel, tensor_parallel)
    assert len({rank["part"][1].item() for rank in ranks}) == head_parallel
    per_rank = GLOBAL_BATCH * tensor_parallel // num_ranks
    for rank in ranks:
        number, begin = rank["part"].tolist()
        classes, images = slice(begin, begin + len(rank["grad"])), slice(number * per_rank, (number + 1) * per_rank)
        assert_close("loss", rank["loss"], expected["loss"], TOLERANCE)
        assert_close("norm", rank["norm"], expected["norm"], TOLERANCE)
        assert_close("embeddings", rank["emb_grad"], expected["emb_grad"][images], TOLERANCE)
        assert_close("centres", rank["grad"], expected["grad"][classes], TOLERANCE)
        assert_close("weights", rank["weight"], expected["weight"][classes], TOLERANCE)


@pytest.mark.parametrize(("mistake", "wrong"), [("no sum over replicas", "grad"), ("another's images", "emb_grad")])
def test_known_bad_layouts_are_told_apart(mistake: str, wrong: str) -> None:
    expected = alone()
    for rank in run_ranks(one_step, 4, 2, 1, mistake):
        number, begin = rank["part"].tolist()
        part = slice(begin, begin + len(rank["grad"])) if wrong == "grad" else slice(number * 6, number * 6 + 6)
        assert_differs(mistake, rank[wrong], expected[wrong][part], TOLERANCE)


def sizes_refused(group: Group) -> list[str]:
    messages = []
    for head_parallel, tensor_parallel in ((2, 1), (None, 2), (1, 3)):
        try:
            make_head_groups(group, head_parallel, tensor_parallel)
            messages.append("")
        except UserError as error:
            messages.append(str(error))
    try:
        PartialFCHead(2, DIM, HeadConfig(), ClassLoss(ClassLossConfig()), make_head_groups(group), 0)
        messages.append("")
    except UserError as error:
        messages.append(str(error))
    return messages


def test_sizes_that_do_not_divide_are_refused() -> None:
    for messages in run_ranks(sizes_refused, 3):
        assert "head.parallel_size 2 must divide the 3 ranks" in messages[0] and "[1, 3]" in messages[0]
        assert "tensor parallel size 2 does not divide the 3 ranks" in messages[1]
        assert "multiple of the tensor parallel size 3" in messages[2] and "[3]" in messages[2]
        assert "3 ranks cannot share 2 classes" in messages[3]
