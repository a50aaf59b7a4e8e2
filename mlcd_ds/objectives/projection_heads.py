"""ProtoCLIP's projection heads: Linear, batch norm over all ranks, ReLU, Linear, unit length; one a tower.

Their parameters live in the engine, which trains them and gives copies; here they are used. The first Linear has no
bias, which the batch norm would take away.

B images on this rank, E embedding, H hidden width, P projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcd_ds.distributed.collectives import Group

MOMENTUM, EPS = 0.1, 1e-5  # torch's
PARTS = ("inner", "gain", "shift", "outer", "bias")
"""[H, E], [H], [H], [P, H], [P]."""


def head_names(tower: str) -> tuple[str, ...]:
    """The outputs of the engine that are parameters of a tower's head."""
    return tuple(f"proto_{tower}_{part}" for part in PARTS)


class HeadParameters(nn.Module):
    """Of the heads of both towers, which begin alike; gives copies, as ZeRO stage 3 frees the parameters."""

    def __init__(self, embed_dim: int, hidden: int, dim: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def uniform(*shape: int, fan_in: int) -> Tensor:
            return (2 * torch.rand(shape, generator=generator) - 1) / fan_in**0.5  # torch's nn.Linear

        first = {"inner": uniform(hidden, embed_dim, fan_in=embed_dim)}
        first |= {"gain": torch.ones(hidden), "shift": torch.zeros(hidden)}
        first |= {"outer": uniform(dim, hidden, fan_in=hidden), "bias": uniform(dim, fan_in=hidden)}
        for tower in ("image", "text"):
            for part, value in first.items():
                # Not of nn.Linear, which tensor parallelism would cut.
                self.register_parameter(f"{tower}_{part}", nn.Parameter(value.clone()))

    def forward(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """fp32 copies by `head_names`."""
        return {f"proto_{name}": parameter.to(torch.float32, copy=True) for name, parameter in self.named_parameters()}


class _SumOverRanks(torch.autograd.Function):
    """Forward and backward: the sum over ranks, each of which has its own summand of the loss."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.all_reduce_sum(values.clone())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return ctx.group.all_reduce_sum(upstream.clone(memory_format=torch.contiguous_format)), None


class RunningMoments:
    """Of a head's batch norm: mean and unbiased variance fp32 [H], moving averages over steps, alike on all ranks."""

    def __init__(self, hidden: int, device: torch.device) -> None:
        self.mean_H, self.variance_H = torch.zeros(hidden, device=device), torch.ones(hidden, device=device)

    def update(self, mean_H: Tensor, variance_H: Tensor, count: int) -> None:
        """Take in a step's moments over `count` images."""
        self.mean_H.lerp_(mean_H.detach().float(), MOMENTUM)
        self.variance_H.lerp_(variance_H.detach().float() * (count / max(1, count - 1)), MOMENTUM)


def project(emb_BE: Tensor, head: Mapping[str, Tensor], running: RunningMoments, group: Group | None) -> Tensor:
    """Unit rows [B, P]; `head` maps PARTS to parameters.

    With a group as in training: by the moments of the images of all its ranks, which `running` takes in; B is the same
    on each. Two all-reduces of [H], and two in the backward pass. Without: by the running moments.
    """
    hidden_BH = emb_BE @ head["inner"].T
    if group is None:
        mean_H, variance_H = (moment.to(hidden_BH.dtype) for moment in (running.mean_H, running.variance_H))
    else:
        count = len(hidden_BH) * group.size
        mean_H = _SumOverRanks.apply(hidden_BH.sum(dim=0), group) / count
        variance_H = _SumOverRanks.apply((hidden_BH - mean_H).square().sum(dim=0), group) / count
        running.update(mean_H, variance_H, count)
    normal_BH = (hidden_BH - mean_H) * (variance_H + EPS).rsqrt()
    return F.normalize(F.relu(normal_BH * head["gain"] + head["shift"]) @ head["outer"].T + head["bias"], dim=1)
