"""The optimizers of backbone and head, as the recipe describes them."""

from __future__ import annotations

import torch
from torch import nn

from mlcd_ds.config import OptimizerConfig
from mlcd_ds.heads.partial_fc import PartialFCHead
from mlcd_ds.heads.row_optimizer import AdamWRule, RowOptimizer, RowRule, SGDRule


def backbone_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Decay on matrices; none on vectors (norms, biases, class token) and positions."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and "position_embedding" not in name
        (decayed if is_matrix else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def head_optimizer(head: PartialFCHead, config: OptimizerConfig) -> RowOptimizer:
    """The centres' optimizer, as the head's settings say."""
    rule: RowRule
    if head.config.optimizer == "adamw":
        rule = AdamWRule(config.betas, config.eps, config.weight_decay)
    else:
        rule = SGDRule(head.config.momentum, config.weight_decay)
    return RowOptimizer(head, rule, config.head_clip_norm, is_lazy=head.config.update == "lazy")


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr
