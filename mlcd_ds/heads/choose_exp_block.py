"""Which implementation forms the logits' blocks."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

from mlcd_ds.errors import UserError
from mlcd_ds.heads.negatives import ExpBlock, TorchExpBlock
from mlcd_ds.kernels.matmul import Matmul


def check_kernel(kernel: Literal["auto", "torch", "triton"], device_type: str) -> None:
    """Raise UserError when triton is asked for and is not installed, or has no GPU (TRITON_INTERPRET=1 needs none)."""
    if kernel != "triton":
        return
    if importlib.util.find_spec("triton") is None:
        raise UserError("head.kernel is triton, which is not installed: pip install triton, or set head.kernel=torch.")
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("head.kernel is triton, but this process sees no GPU: set head.kernel=auto, or find one.")


def choose_exp_block(kernel: Literal["auto", "torch", "triton"], matmul: Matmul) -> ExpBlock:
    """The block's implementation by `head.kernel`. UserError when triton is asked for and cannot run."""
    has_triton = importlib.util.find_spec("triton") is not None
    # In fp32 Triton would multiply without tensor cores, and its tiles would not fit every GPU.
    suits_triton = has_triton and matmul.device_type == "cuda" and matmul.is_bf16
    if kernel == "torch" or (kernel == "auto" and not suits_triton):
        return TorchExpBlock(matmul)
    check_kernel(kernel, matmul.device_type)
    from mlcd_ds.heads.triton_exp import TritonExpBlock

    return TritonExpBlock(matmul)
