"""The optimizers of backbone and head, as the recipe describes them."""

from __future__ import annotations

import torch
from torch import nn

from mlcd_ds.config import OptimizerConfig
from mlcd_ds.heads.partial_fc import PartialFCHead
from mlcd_ds.heads.row_optimizer import AdamWRule, RowOptimizer, RowRule, SGDRule
from mlcd_ds.models.vit import ViT

WITHOUT_DECAY = ("position_embedding", "class_pos_emb")  # of two dimensions, and no matrices for all that


def backbone_optimizer(model: ViT, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with decay on matrices, none on vectors (norms, biases, class token) and positions; by depth with
    `layer_decay`, as `lr_scale` of the groups."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and not any(part in name for part in WITHOUT_DECAY)
        scale = config.layer_decay ** (model.config.depth + 1 - _layer(name, model.config.depth))
        groups.setdefault((is_matrix, scale), []).append(parameter)
    described = [
        {"params": parameters, "weight_decay": config.weight_decay if is_matrix else 0.0, "lr_scale": scale}
        for (is_matrix, scale), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]
    return torch.optim.AdamW(described, lr=config.lr, betas=config.betas, eps=config.eps)


def _layer(name: str, depth: int) -> int:
    """0 for the embeddings, 1 ... depth for the blocks, depth + 1 for what comes after them."""
    if name.startswith("encoder.layers."):
        return int(name.split(".")[2]) + 1
    return 0 if name.startswith(("embeddings", "pre_layrnorm", "rotary")) else depth + 1


def head_optimizer(head: PartialFCHead, config: OptimizerConfig) -> RowOptimizer:
    """The centres' optimizer, as the head's settings say."""
    rule: RowRule
    if head.config.optimizer == "adamw":
        rule = AdamWRule(config.betas, config.eps, config.weight_decay)
    else:
        rule = SGDRule(head.config.momentum, config.weight_decay)
    return RowOptimizer(head, rule, config.head_clip_norm, is_lazy=head.config.update == "lazy")


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of all groups, each by its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
