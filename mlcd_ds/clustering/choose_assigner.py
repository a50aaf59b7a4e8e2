"""Which assigner and which precision, by the command line and the device."""

from __future__ import annotations

import importlib.util

import torch

from mlcd_ds.clustering.assigner import Assigner, AssignerName, Metric, Precision
from mlcd_ds.clustering.blockwise import BlockwiseAssigner
from mlcd_ds.clustering.faiss_assigner import FaissAssigner, FaissGpuAssigner
from mlcd_ds.errors import UserError
from mlcd_ds.kernels.device import check_bf16, check_triton, has_bf16, has_triton

# Below so many multiplications in a pass, fp32 takes seconds and bf16's rounding is not worth them.
MANY_MULTIPLICATIONS = 10**12


def resolve_precision(precision: Precision, device: torch.device, num_multiplications: float) -> bool:
    """Whether products take bf16 inputs. `auto`: on a GPU or CPU that is fast with them, where a pass is long.

    UserError when bf16 is asked for and the GPU has none.
    """
    if precision == "bf16":
        check_bf16(device, "--precision bf16", "pass --precision fp32")
    if precision != "auto":
        return precision == "bf16"
    has_fast_bf16 = has_bf16(device) if device.type == "cuda" else torch.cpu._is_amx_tile_supported()
    return has_fast_bf16 and num_multiplications >= MANY_MULTIPLICATIONS


def choose_assigner(name: AssignerName, metric: Metric, device: torch.device, is_bf16: bool) -> Assigner:
    """The assigner by `--assigner`. UserError when one is asked for that cannot run here.

    `auto` is torch on a CPU. On a GPU it is triton for bf16, else torch.
    """
    is_installed = importlib.util.find_spec("triton") is not None
    if name == "faiss":
        if device.type == "cuda":
            return FaissGpuAssigner(metric, is_bf16)
        if is_bf16:
            raise UserError("--assigner faiss multiplies fp32 on a CPU: pass --precision fp32, or --assigner torch.")
        return FaissAssigner(metric)
    suits_triton = is_installed and device.type == "cuda" and is_bf16 and has_triton(device)
    if name == "torch" or (name == "auto" and not suits_triton):
        return BlockwiseAssigner(metric, is_bf16, device)
    if not is_installed:
        raise UserError("--assigner triton: triton is not installed: pip install triton, or pass --assigner torch.")
    check_triton(device, "--assigner triton", "pass --assigner torch")
    from mlcd_ds.clustering.triton_nearest import TritonAssigner
    from mlcd_ds.kernels.triton_product import tile_shape

    return TritonAssigner(metric, is_bf16, device, *tile_shape(is_bf16))
