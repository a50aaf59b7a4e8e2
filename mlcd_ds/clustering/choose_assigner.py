"""Which assigner and which precision, by the command line and the device."""

from __future__ import annotations

import importlib.util

import torch

from mlcd_ds.clustering.assigner import Assigner, AssignerName, Metric, Precision
from mlcd_ds.clustering.blockwise import BlockwiseAssigner
from mlcd_ds.clustering.faiss_assigner import FaissAssigner, FaissGpuAssigner
from mlcd_ds.errors import UserError

# Below so many multiplications in a pass, fp32 takes seconds and bf16's rounding is not worth them.
MANY_MULTIPLICATIONS = 10**12


def resolve_precision(precision: Precision, device: torch.device, num_multiplications: float) -> bool:
    """Whether products take bf16 inputs. `auto`: on a GPU, or a CPU with bf16 tiles, where a pass is long."""
    if precision != "auto":
        return precision == "bf16"
    has_fast_bf16 = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
    return has_fast_bf16 and num_multiplications >= MANY_MULTIPLICATIONS


def choose_assigner(name: AssignerName, metric: Metric, device: torch.device, is_bf16: bool) -> Assigner:
    """The assigner by `--assigner`. UserError when one is asked for that cannot run here.

    `auto` is torch on a CPU. On a GPU it is triton for bf16, else torch.
    """
    has_triton = importlib.util.find_spec("triton") is not None
    if name == "faiss":
        if device.type == "cuda":
            return FaissGpuAssigner(metric, is_bf16)
        if is_bf16:
            raise UserError("--assigner faiss multiplies fp32 on a CPU: pass --precision fp32, or --assigner torch.")
        return FaissAssigner(metric)
    if name == "torch" or (name == "auto" and not (has_triton and device.type == "cuda" and is_bf16)):
        return BlockwiseAssigner(metric, is_bf16, device)
    if not has_triton:
        raise UserError("--assigner triton: triton is not installed: pip install triton, or pass --assigner torch.")
    from mlcd_ds.clustering.triton_nearest import TritonAssigner

    return TritonAssigner(metric, is_bf16, device)
