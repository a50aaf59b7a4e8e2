"""Which assigner and which precision, by the command line and the device."""

from __future__ import annotations

import importlib.util

import torch

from mlcd_ds.clustering.assigner import Assigner, AssignerName, Metric, Precision
from mlcd_ds.clustering.blockwise import BlockwiseAssigner
from mlcd_ds.clustering.faiss_assigner import FaissAssigner, FaissGpuAssigner, has_faiss
from mlcd_ds.errors import UserError
from mlcd_ds.kernels.device import check_bf16, check_triton, has_bf16, has_triton

# With fewer multiplications than this in a pass, fp32 takes seconds, and saving those is not worth bf16's rounding.
MANY_MULTIPLICATIONS = 10**12
EXTRAS = {"cpu": "cpu", "cuda": "gpu"}  # the package's extra that installs faiss for a device type


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


def resolve_assigner(name: AssignerName, device: torch.device, is_bf16: bool) -> AssignerName:
    """`auto` is faiss in fp32, where it is installed for the device, and in bf16 triton on a GPU; else torch."""
    if name != "auto":
        return name
    if not is_bf16:
        return "faiss" if has_faiss(device) else "torch"
    return "triton" if device.type == "cuda" and _is_installed() and has_triton(device) else "torch"


def choose_assigner(name: AssignerName, metric: Metric, device: torch.device, is_bf16: bool) -> Assigner:
    """The assigner by `--assigner`. UserError when one is asked for that cannot run here."""
    name = resolve_assigner(name, device, is_bf16)
    if name == "faiss":
        if device.type == "cuda":
            return FaissGpuAssigner(metric, is_bf16)
        if is_bf16:
            raise UserError("--assigner faiss multiplies fp32 on a CPU: pass --precision fp32, or --assigner torch.")
        return FaissAssigner(metric)
    if name == "torch":
        return BlockwiseAssigner(metric, is_bf16, device)
    if not _is_installed():
        raise UserError("--assigner triton: triton is not installed: pip install triton, or pass --assigner torch.")
    check_triton(device, "--assigner triton", "pass --assigner torch")
    from mlcd_ds.clustering.triton_nearest import TritonAssigner
    from mlcd_ds.kernels.triton_product import tile_shape

    return TritonAssigner(metric, is_bf16, device, *tile_shape(is_bf16))


def describe_assigner(name: AssignerName, device: torch.device, is_bf16: bool) -> str:
    """The assigner and its precision, for the log."""
    used = resolve_assigner(name, device, is_bf16)
    text = f"{used}, {'bf16' if is_bf16 else 'fp32'}"
    if name == "auto" and not is_bf16 and used != "faiss":
        text += f' (no faiss here for {device.type}: pip install "mlcd_ds[{EXTRAS[device.type]}]")'
    return text


def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
