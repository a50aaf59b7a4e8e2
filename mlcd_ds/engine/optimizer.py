"""The optimizer of all that lives in the engine, as the recipe describes it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from mlcd_ds.distributed.deepspeed import muon_optimizer
from mlcd_ds.models.towers import Towers, split_name
from mlcd_ds.recipes.sections import OptimizerConfig

# 2-D embeddings: no decay.
WITHOUT_DECAY = ("position_embedding", "class_pos_emb", "register_embedding")


def backbone_optimizer(model: Towers, config: OptimizerConfig, zero_stage: int = 0) -> torch.optim.Optimizer:
    """AdamW with decay on matrices, none on vectors (norms, biases, class token) and positions; by depth with
    `layer_decay`, as `lr_scale` of the groups. With "muon" the blocks' matrices are Muon's. A group is of one tower."""
    groups: dict[tuple[bool, bool, float, str], list[nn.Parameter]] = {}
    for stored_name, parameter in model.stored_parameters():
        tower, name = split_name(stored_name)
        depth = model[tower].config.depth if tower in model.names else 0
        is_matrix = parameter.ndim >= 2 and not any(part in name for part in WITHOUT_DECAY)
        is_muon = config.name == "muon" and is_matrix and name.startswith("encoder.layers.")
        scale = config.layer_decay ** (depth + 1 - _layer(name, depth))
        groups.setdefault((is_muon, is_matrix, scale, tower), []).append(parameter)
    described: list[dict[str, Any]] = []
    for (is_muon, is_matrix, scale, tower), parameters in sorted(
        groups.items(), key=lambda item: item[0], reverse=True
    ):
        group: dict[str, Any] = {"params": parameters, "lr": config.lr, "lr_scale": scale, "tower": tower}
        group["weight_decay"] = config.weight_decay if is_matrix else 0.0
        if is_muon:
            group |= {"lr_scale": scale * config.muon_lr_scale, "momentum": config.muon_momentum}
            group["weight_decay"] /= config.muon_lr_scale  # decay is multiplied by the rate: this keeps it as it was
        else:
            group |= {"betas": config.betas, "eps": config.eps}
        described.append(group)
    if config.name == "muon":
        return muon_optimizer([group | {"use_muon": "momentum" in group} for group in described], zero_stage)
    return torch.optim.AdamW(described, fused=True)  # the others keep two more copies of the gradients in a step


def _layer(name: str, depth: int) -> int:
    """0 for the embeddings, 1 ... depth for a tower's blocks, depth + 1 for what comes after them."""
    if name.startswith("encoder.layers."):
        return int(name.split(".")[2]) + 1
    return 0 if name.startswith(("embeddings", "pre_layrnorm", "rotary")) else depth + 1


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float, still_towers: Collection[str] = ()) -> None:
    """Set the rate of all groups, each by its own factor; 0 for those towers, which stay as they are."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if group.get("tower") in still_towers else lr * group.get("lr_scale", 1.0)
