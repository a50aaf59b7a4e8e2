"""Which implementation forms the logits' blocks."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch

from mlcd_ds.errors import UserError
from mlcd_ds.heads.negatives import ExpBlock, TorchExpBlock
from mlcd_ds.kernels.device import check_triton, has_triton
from mlcd_ds.kernels.matmul import Matmul


def check_kernel(kernel: Literal["auto", "torch", "triton"], device: torch.device, *, has_filter: bool = False) -> None:
    """Raise UserError when triton is asked for and is not installed, has no GPU (TRITON_INTERPRET=1 needs none), or
    should leave out logits, which it cannot."""
    if kernel != "triton":
        return
    if has_filter:
        raise UserError(
            "head.kernel is triton, which does not know objective.similarity_filter: set head.kernel=auto, or "
            "objective.similarity_filter=null."
        )
    if importlib.util.find_spec("triton") is None:
        raise UserError("head.kernel is triton, which is not installed: pip install triton, or set head.kernel=torch.")
    if device.type != "cuda" and not has_triton(device):
        raise UserError("head.kernel is triton, but this process sees no GPU: set head.kernel=auto, or find one.")
    check_triton(device, "head.kernel triton", "set head.kernel=torch")


def choose_exp_block(
    kernel: Literal["auto", "torch", "triton"],
    matmul: Matmul,
    device: torch.device,
    filtered_above: float | None = None,
) -> ExpBlock:
    """The block's implementation by `head.kernel` (see `TorchExpBlock`). UserError when triton is to and cannot."""
    is_installed, has_filter = importlib.util.find_spec("triton") is not None, filtered_above is not None
    # In fp32 Triton would multiply without tensor cores.
    suits_triton = is_installed and device.type == "cuda" and matmul.is_bf16 and has_triton(device)
    if kernel == "torch" or (kernel == "auto" and (has_filter or not suits_triton)):
        return TorchExpBlock(matmul, filtered_above)
    check_kernel(kernel, device, has_filter=has_filter)
    from mlcd_ds.heads.triton_exp import TritonExpBlock
    from mlcd_ds.kernels.triton_product import tile_shape

    return TritonExpBlock(matmul, *tile_shape(matmul.is_bf16))
