"""Rows of the head move as torch's optimizers move them, lazily or densely."""

from __future__ import annotations

import pytest
import torch
from distributed_harness import assert_close, assert_differs, run_ranks
from torch import Tensor

from mlcd_ds.distributed.collectives import Group
from mlcd_ds.heads.groups import make_head_groups
from mlcd_ds.heads.partial_fc import HeadConfig, PartialFCHead
from mlcd_ds.heads.row_optimizer import AdamWRule, RowOptimizer, RowRule, SGDRule
from mlcd_ds.objectives.class_losses import ClassLoss, ClassLossConfig

NUM_CLASSES, DIM, NUM_STEPS, LR = 1500, 6, 12, 3e-2  # more rows than a block holds
RULES: dict[str, RowRule] = {"adamw": AdamWRule((0.9, 0.98), 1e-6, 0.2), "sgd": SGDRule(0.9, 0.1)}
TOLERANCE = 2e-6  # fp32 against float64, relative to the largest entry: measured 2.1e-7


def make_gradients() -> tuple[Tensor, Tensor]:
    """Gradients [steps, C, E] of unequal size, and which rows are touched [steps, C]; class 7 never is."""
    generator = torch.Generator().manual_seed(0)
    touched = torch.rand(NUM_STEPS, NUM_CLASSES, generator=generator) < 0.3
    touched[:, 7] = False
    touched[0] = False  # a step without any
    grads = torch.randn(NUM_STEPS, NUM_CLASSES, DIM, generator=generator) * torch.logspace(-3, 0, NUM_CLASSES)[:, None]
    return grads * touched[:, :, None], touched


def move_rows(group: Group, max_norm: float) -> dict[tuple[str, bool, bool], dict[str, Tensor]]:
    """Weights and state after all steps, by rule, laziness, and whether the host may wait for the device."""
    grads, touched = make_gradients()
    results = {}
    for name, rule in RULES.items():
        for is_lazy, may_wait in ((True, True), (False, True), (True, False)):
            loss = ClassLoss(ClassLossConfig(scale=16.0))
            head = PartialFCHead(NUM_CLASSES, DIM, HeadConfig(init_std=1.0), loss, make_head_groups(group), 3)
            head.init_weights()
            initial = head.weight_LE.detach().clone()
            head.allow_host_sync = may_wait
            optimizer = RowOptimizer(head, rule, max_norm, is_lazy=is_lazy)
            mine, norms = slice(head.classes.begin, head.classes.end), []
            for grad_CE, touched_C in zip(grads, touched, strict=True):
                head.grad_LE.copy_(grad_CE[mine])
                head.touched_L.copy_(touched_C[mine])
                norms.append(optimizer.step(LR))
            assert not head.grad_LE.any() and not head.touched_L.any()
            state = {"initial": initial, "weight": head.weight_LE.detach(), **optimizer.state}
            results[name, is_lazy, may_wait] = {**state, "norms": torch.stack(norms)}
    return results


def by_torch(name: str, initial_CE: Tensor, is_lazy: bool, max_norm: float) -> dict[str, Tensor]:
    """The same steps in float64: torch's optimizer over all rows, or one for each row that sees only its own steps."""
    grads, touched = make_gradients()
    rule = RULES[name]
    rows = [row.double().clone().requires_grad_() for row in (initial_CE if is_lazy else [initial_CE])]
    optimizers = [
        torch.optim.AdamW([row], lr=LR, betas=rule.betas, eps=rule.eps, weight_decay=rule.weight_decay)
        if isinstance(rule, AdamWRule)
        else torch.optim.SGD([row], lr=LR, momentum=rule.momentum, weight_decay=rule.weight_decay)
        for row in rows
    ]
    norms = []
    for grad_CE, touched_C in zip(grads.double(), touched, strict=True):
        norms.append(grad_CE.norm())
        grad_CE = grad_CE * (max_norm / (norms[-1] + 1e-6)).clamp_max(1.0)
        for number, (row, optimizer) in enumerate(zip(rows, optimizers, strict=True)):
            if not is_lazy or touched_C[number]:
                row.grad = grad_CE[number].clone() if is_lazy else grad_CE
                optimizer.step()
    weights = torch.stack([row.detach() for row in rows])
    return {"weight": weights if is_lazy else weights[0], "norms": torch.stack(norms)}


@pytest.mark.parametrize("max_norm", [1e6, 0.5])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_rows_move_as_torch_moves_them(num_ranks: int, max_norm: float) -> None:
    ranks = run_ranks(move_rows, num_ranks, max_norm)
    touched = make_gradients()[1]
    for name in RULES:
        lazy, dense, static = (
            {key: torch.cat([rank[(name, *form)][key] for rank in ranks]) for key in ("initial", "weight", "step")}
            for form in ((True, True), (False, True), (True, False))
        )
        expected = by_torch(name, lazy["initial"], True, max_norm)
        assert_close(f"lazy {name}", lazy["weight"], expected["weight"], TOLERANCE)
        assert_close(f"lazy {name}, all rows read", static["weight"], expected["weight"], TOLERANCE)
        assert torch.equal(static["weight"][7], lazy["weight"][7]) and torch.equal(static["step"], lazy["step"])
        assert torch.equal(lazy["weight"][7], lazy["initial"][7]), "a row that was never touched"
        assert lazy["step"].tolist() == touched.sum(dim=0).tolist()

        expected_dense = by_torch(name, dense["initial"], False, max_norm)
        assert_close(f"dense {name}", dense["weight"], expected_dense["weight"], TOLERANCE)
        assert dense["step"].unique().tolist() == [NUM_STEPS]
        for rank in ranks:
            assert_close("norms", rank[name, True, True]["norms"], expected["norms"], TOLERANCE)

        assert_differs("lazy and dense", lazy["weight"], expected_dense["weight"], TOLERANCE)
        unclipped = by_torch(name, lazy["initial"], True, 0.6 if max_norm == 0.5 else 0.5)
        if name == "sgd":  # AdamW hardly sees a factor on all gradients
            assert_differs("clipped at another norm", lazy["weight"], unclipped["weight"], TOLERANCE)


def test_one_count_for_all_rows_is_told_apart() -> None:
    """Bias correction by the number of steps of the run instead of the row's."""
    weight, grad = torch.zeros(2, 1), torch.ones(2, 1)
    moments = [torch.zeros(2, 1), torch.zeros(2, 1)]
    moved, _ = RULES["adamw"].update(weight, grad, moments, torch.tensor([1, 9]), LR)
    assert_close("first step", moved[:1], torch.tensor([[-LR]]), 1e-5)
    assert_differs("other count", moved[:1], moved[1:].clone(), 1e-5)


def step_with_nan(group: Group) -> tuple[Tensor, Tensor, bool, list[int]]:
    loss = ClassLoss(ClassLossConfig(scale=16.0))
    head = PartialFCHead(6, 2, HeadConfig(init_std=1.0), loss, make_head_groups(group), 3)
    head.init_weights()
    before = head.weight_LE.detach().clone()
    optimizer = RowOptimizer(head, RULES["adamw"], 1.0, is_lazy=True)
    head.touched_L.fill_(1)
    head.grad_LE.fill_(1)
    if group.rank == 0:
        head.grad_LE[0, 0] = torch.nan
    optimizer.step(LR)
    is_clean = not head.grad_LE.any() and not head.touched_L.any() and not optimizer.state["step"].any()
    skipped = [optimizer.take_num_skipped(), optimizer.take_num_skipped()]
    return before, head.weight_LE.detach(), is_clean, skipped


def test_a_gradient_that_is_not_finite_moves_no_row_on_any_rank() -> None:
    for before, after, is_clean, skipped in run_ranks(step_with_nan, 2):
        assert torch.equal(before, after) and is_clean and skipped == [1, 0]
