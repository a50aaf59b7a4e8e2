"""AdamW with decay groups, for backbone and head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mlcd_ds.config import OptimizerConfig
from mlcd_ds.distributed.collectives import Group


def backbone_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Decay on matrices; none on vectors (norms, biases, class token) and positions."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and "position_embedding" not in name
        (decayed if is_matrix else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def head_optimizer(head: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Dense AdamW over this rank's centres."""
    return torch.optim.AdamW(
        head.parameters(), lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_sharded_gradient(parameter: nn.Parameter, max_norm: float, group: Group) -> Tensor:
    """Scale the gradient of a class-sharded parameter so that its norm over all shards is at most `max_norm`.

    Returns the norm before, as a tensor (no host synchronisation). Collective: all-reduce of one number.
    """
    assert parameter.grad is not None
    norm = group.all_reduce_sum(parameter.grad.square().sum()).sqrt()
    parameter.grad.mul_((max_norm / (norm + 1e-6)).clamp_max(1.0))
    return norm
