"""How a ViT's layers are split over a tensor-parallel group (Megatron-LM, arXiv 1909.08053, section 3).

In a pair of layers the first is split by its outputs, the second by its inputs: query, key, value and the MLP's first
layer by rows of their weights, the attention's output and the MLP's second layer by columns. A pair costs one
all-reduce [B, T, D] in each direction. Everything else is whole on every rank. DeepSpeed's AutoTP does the splitting.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlcd_ds.distributed.collectives import Group

SPLIT_BY_OUTPUT = ("q_proj", "k_proj", "v_proj", "fc1")
SPLIT_BY_INPUT = ("out_proj", "fc2")


def autotp_section(size: int) -> dict[str, Any]:
    """DeepSpeed's `tensor_parallel` section for a `ViT`."""

    def spec(layers: tuple[str, ...], kind: str) -> dict[str, Any]:
        return {"patterns": [rf".*\.({'|'.join(layers)})\.weight$"], "partition_type": kind}

    specs = [spec(SPLIT_BY_OUTPUT, "column"), spec(SPLIT_BY_INPUT, "row")]
    return {"autotp_size": size, "partition_config": {"use_default_specs": False, "layer_specs": specs}}


def split_dim(name: str) -> int | None:
    """The dimension in which a parameter is split, None where every rank has all of it."""
    layer, kind = name.split(".")[-2:] if "." in name else ("", name)
    if layer in SPLIT_BY_OUTPUT:
        return 0
    return 1 if layer in SPLIT_BY_INPUT and kind == "weight" else None


def gather_full(name: str, part: Tensor, group: Group | None) -> Tensor:
    """A parameter (or a moment of it) from the parts of a tensor-parallel group. Collective: an all-gather."""
    dim = split_dim(name)
    if group is None or dim is None:
        return part
    return torch.cat(list(group.all_gather(part[None].contiguous())), dim=dim)


def local_shard(name: str, tensor: Tensor, group: Group | None) -> Tensor:
    """This rank's part of a whole parameter: the inverse of `gather_full`."""
    dim = split_dim(name)
    if group is None or dim is None:
        return tensor
    return tensor.chunk(group.size, dim)[group.rank].contiguous()
