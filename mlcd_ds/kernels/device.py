"""What a device can multiply."""

from __future__ import annotations

import os

import torch

from mlcd_ds.errors import UserError

BF16_CAPABILITY = (8, 0)  # of CUDA: Ampere


def has_bf16(device: torch.device) -> bool:
    """Whether products take bf16. Older GPUs only emulate it, slower than fp32; a CPU rounds and multiplies fp32."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= BF16_CAPABILITY


def has_triton(device: torch.device) -> bool:
    """Whether Triton compiles for the device, or (for tests) interprets its kernels there."""
    if device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1"
    return torch.cuda.get_device_capability(device) >= BF16_CAPABILITY


def check_bf16(device: torch.device, asked_by: str, fix: str) -> None:
    """UserError where `device` has no bf16: names what asks for it, and what to do."""
    if not has_bf16(device):
        raise UserError(f"{asked_by} needs a GPU with bf16 (Ampere or newer), which this one is not: {fix}.")


def check_triton(device: torch.device, asked_by: str, fix: str) -> None:
    """UserError where Triton's kernels do not run on `device`: names what asks for them, and what to do."""
    if not has_triton(device):
        raise UserError(f"{asked_by} needs a GPU, Ampere or newer: {fix}.")
