"""Which implementation forms the logits' blocks."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch

from mlcd_ds.errors import UserError
from mlcd_ds.heads.negatives import ExpBlock, TorchExpBlock
from mlcd_ds.kernels.device import check_triton, has_triton
from mlcd_ds.kernels.matmul import Matmul


def check_kernel(kernel: Literal["auto", "torch", "triton"], device: torch.device) -> None:
    """Raise UserError when triton is asked for and is not installed, or has no GPU (TRITON_INTERPRET=1 needs none)."""
    if kernel != "triton":
        return
    if importlib.util.find_spec("triton") is None:
        raise UserError("head.kernel is triton, which is not installed: pip install triton, or set head.kernel=torch.")
    if device.type != "cuda" and not has_triton(device):
        raise UserError("head.kernel is triton, but this process sees no GPU: set head.kernel=auto, or find one.")
    check_triton(device, "head.kernel triton", "set head.kernel=torch")


def choose_exp_block(kernel: Literal["auto", "torch", "triton"], matmul: Matmul, device: torch.device) -> ExpBlock:
    """The block's implementation by `head.kernel`. UserError when triton is asked for and cannot run."""
    is_installed = importlib.util.find_spec("triton") is not None
    # In fp32 Triton would multiply without tensor cores.
    suits_triton = is_installed and device.type == "cuda" and matmul.is_bf16 and has_triton(device)
    if kernel == "torch" or (kernel == "auto" and not suits_triton):
        return TorchExpBlock(matmul)
    check_kernel(kernel, device)
    from mlcd_ds.heads.triton_exp import TritonExpBlock
    from mlcd_ds.kernels.triton_product import tile_shape

    return TritonExpBlock(matmul, *tile_shape(matmul.is_bf16))
