"""GPUs that the planner and the log know, by the vendor's sheets."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    """Memory in GiB, dense bf16 peak in TFLOP/s, and the share of it that a good run reaches.

    GB/s that a GPU sends to others, within its node over NVLink and between nodes over a network card of its own: 80 %
    of what the sheets say for one direction.
    """

    memory_gib: float
    peak_tflops: float
    usual_mfu: float
    within_gb: float
    between_gb: float


GPUS = {
    "a100-40gb": Gpu(40, 312, 0.45, 240, 20),
    "a100-80gb": Gpu(80, 312, 0.45, 240, 20),
    "h100": Gpu(80, 989, 0.40, 360, 40),
    "h200": Gpu(141, 989, 0.40, 360, 40),
}


def gpu_named(device_name: str) -> Gpu | None:
    """The GPU with this name in CUDA ("NVIDIA A100-SXM4-80GB"), None where it is not in the table."""
    name = device_name.lower()
    return next((gpu for key, gpu in GPUS.items() if all(part in name for part in key.split("-"))), None)


def peak_tflops(device: torch.device) -> float | None:
    """Dense bf16 peak of a device, None where it is not known."""
    if device.type != "cuda":
        return None
    gpu = gpu_named(torch.cuda.get_device_name(device))
    return gpu.peak_tflops if gpu else None
