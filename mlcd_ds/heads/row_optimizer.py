"""AdamW and SGD with momentum over the rows of a head that a step has touched.

A dense optimizer moves every row at every step: rows that had no gradient follow their old momentum and decay. With a
tenth of the classes in a step, nine of ten rows that move had no gradient (and, where the host may list the touched
rows, cause nine tenths of the work).
Lazy: a row that was not touched stays as it is, with its moments; each row counts its own steps, and bias correction
and decay go by that count. Dense: all rows count as touched, which is torch's AdamW and SGD.

L classes on this rank, E embedding; n: rows of one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mlcd_ds.heads.partial_fc import PartialFCHead

BLOCK_ROWS = {"cpu": 1024, "cuda": 8192}


class RowRule(Protocol):
    """How rows move."""

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of the state tensors [L, E]."""

    def update(
        self, weight_nE: Tensor, grad_nE: Tensor, moments: list[Tensor], steps_n: Tensor, lr: float
    ) -> tuple[Tensor, list[Tensor]]:
        """New weights and moments; `steps_n` counts this step."""


@dataclass(frozen=True)
class AdamWRule:
    """Decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2)."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    moments = ("exp_avg", "exp_avg_sq")

    def update(
        self, weight_nE: Tensor, grad_nE: Tensor, moments: list[Tensor], steps_n: Tensor, lr: float
    ) -> tuple[Tensor, list[Tensor]]:
        mean_nE = moments[0].lerp(grad_nE, 1 - self.betas[0])
        square_nE = (moments[1] * self.betas[1]).addcmul_(grad_nE, grad_nE, value=1 - self.betas[1])
        # In float64: at the first steps 1 - beta^n is a small difference.
        corrections = [(1 - beta ** steps_n.double())[:, None].to(weight_nE.dtype) for beta in self.betas]
        root_nE = square_nE.sqrt().div_(corrections[1].sqrt()).add_(self.eps)
        weight_nE = weight_nE * (1 - lr * self.weight_decay)
        return weight_nE.sub_((mean_nE / root_nE).div_(corrections[0]).mul_(lr)), [mean_nE, square_nE]


@dataclass(frozen=True)
class SGDRule:
    """Momentum, with the decay added to the gradient, as in torch.optim.SGD."""

    momentum: float
    weight_decay: float
    moments = ("momentum",)

    def update(
        self, weight_nE: Tensor, grad_nE: Tensor, moments: list[Tensor], steps_n: Tensor, lr: float
    ) -> tuple[Tensor, list[Tensor]]:
        del steps_n
        momentum_nE = moments[0].mul(self.momentum).add_(grad_nE).add_(weight_nE, alpha=self.weight_decay)
        return weight_nE.sub(momentum_nE, alpha=lr), [momentum_nE]


class RowOptimizer:
    """Clips the head's gradient by its norm over all shards, moves the rows, and clears the gradient.

    `state`: the rule's moments [L, E] in fp32, and `step` int32 [L], how often each row was moved.
    """

    def __init__(self, head: PartialFCHead, rule: RowRule, max_norm: float, *, is_lazy: bool) -> None:
        self.head, self.rule, self.max_norm, self.is_lazy = head, rule, max_norm, is_lazy
        weight_LE = head.weight_LE.detach()
        self.state = {name: torch.zeros_like(weight_LE) for name in rule.moments}
        self.state["step"] = torch.zeros(len(weight_LE), dtype=torch.int32, device=weight_LE.device)
        self._num_skipped = torch.zeros((), dtype=torch.int64, device=weight_LE.device)

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        """One step at rate `lr`; returns the gradient's norm before clipping, as a tensor.

        Collectives: those of `PartialFCHead.finish_gradient`, and an all-reduce of one number.
        """
        self.head.finish_gradient()
        weight_LE, grad_LE, touched_L = self.head.weight_LE.detach(), self.head.grad_LE, self.head.touched_L
        if not self.is_lazy:
            touched_L.fill_(1)
        blocks = list(self._blocks(touched_L))
        squares = [grad_LE[rows].square().sum() for rows in blocks] or [grad_LE.new_zeros(())]
        norm = self.head.groups.classes.all_reduce_sum(torch.stack(squares).sum()).sqrt()
        # A gradient that is not finite moves nothing: shared sums would carry it into every sampled row.
        touched_L.mul_(norm.isfinite().to(touched_L.dtype))
        self._num_skipped += ~norm.isfinite()
        factor = (self.max_norm / (norm + 1e-6)).clamp_max(1.0)
        for rows in blocks:
            self._move(rows, weight_LE, grad_LE, touched_L, factor, lr)
        touched_L.zero_()
        return norm

    def take_num_skipped(self) -> int:
        """Steps since the last call whose gradient was not finite. The host waits."""
        taken = int(self._num_skipped)
        self._num_skipped.zero_()
        return taken

    def _move(
        self, rows: Tensor | slice, weight_LE: Tensor, grad_LE: Tensor, touched_L: Tensor, factor: Tensor, lr: float
    ) -> None:
        touched_n1 = touched_L[rows][:, None] > 0
        self.state["step"][rows] += touched_L[rows]
        steps_n = self.state["step"][rows].clamp_min(1)
        old = [self.state[name][rows] for name in self.rule.moments]
        weight_nE, moments = self.rule.update(weight_LE[rows], grad_LE[rows] * factor, old, steps_n, lr)
        weight_LE[rows] = torch.where(touched_n1, weight_nE, weight_LE[rows])
        for name, before, after in zip(self.rule.moments, old, moments, strict=True):
            self.state[name][rows] = torch.where(touched_n1, after, before)
        grad_LE[rows] = 0.0

    def _blocks(self, touched_L: Tensor) -> Iterator[Tensor | slice]:
        """The touched rows. On a GPU all rows: to list the touched ones the host would have to wait."""
        size = BLOCK_ROWS[touched_L.device.type]
        if self.is_lazy and self.head.allow_host_sync:
            yield from touched_L.nonzero().flatten().split(size)
        else:
            yield from (slice(first, first + size) for first in range(0, len(touched_L), size))
