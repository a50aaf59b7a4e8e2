"""The DeepSpeed file: read, checked (ds_sections.py says what may stand in it), and filled from the recipe."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mlcd_ds.artefacts.readers import read_json_object
from mlcd_ds.artefacts.typed import shown
from mlcd_ds.distributed.ds_sections import check_file, validated
from mlcd_ds.errors import UserError

MAX_BUCKET = 10**10  # elements of a ZeRO buffer; in 16 bits that is 20 GB

ELSEWHERE = {
    "optimizer": "the recipe's optimizer section",
    "scheduler": "the recipe's optimizer section",
    "tensorboard": "training writes TensorBoard by itself",
}
UNCHECKED = "without it a gradient that is not finite would spoil the weights"


def read_ds_config(path: Path) -> dict[str, Any]:
    """Read a ds_configs file; UserError names unknown keys and those that belong elsewhere."""
    if not path.exists():
        raise UserError(f"--deepspeed_config {path}: no such file (ours are in ds_configs/).")
    config = read_json_object(path, "Correct it, or give another --deepspeed_config (ours are in ds_configs/).")
    for key in config:
        if key in ELSEWHERE:
            raise UserError(f"{path}: {key!r} is not set here: {ELSEWHERE[key]}.")
    choose_accelerator()
    check_file(config, path)
    _refuse_auto(config.get("zero_optimization"), path, "zero_optimization")
    for name in ("bf16", "fp16"):
        if config.get(name, {}).get("check_grad_overflow") is False:
            raise UserError(f"{path}: {name}.check_grad_overflow: {UNCHECKED}: leave it out.")
    return config


def fill_ds_config(config: dict[str, Any], path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Put the recipe's `values` (dotted DeepSpeed keys) where the file says "auto" or nothing.

    A value that the file states otherwise is an error that names both. No "auto" may be left.
    """
    filled = json.loads(json.dumps(config))
    for dotted, (value, source) in values.items():
        *parents, last = dotted.split(".")
        place = filled
        for parent in parents:
            place = place.setdefault(parent, {})
            _check_section(place, path, parent)
        stated = place.get(last, "auto")
        if stated != "auto" and stated != value:
            raise UserError(
                f'{path}: {dotted} is {shown(stated)}, but {source} makes it {value}. Write "auto" or change one.'
            )
        place[last] = value
    _refuse_auto(filled, path, "")
    return filled


def check_filled_config(config: dict[str, Any], path: Path) -> None:
    """Let DeepSpeed check a filled config as a whole: settings that exclude each other, or need another device."""
    choose_accelerator()
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfig

    deepspeed.logger.setLevel(logging.WARNING)
    # As for one rank: whether batch sizes and ranks agree is checked by the layout.
    one_rank = SimpleNamespace(get_data_parallel_world_size=lambda: 1)
    batch = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
    try:
        DeepSpeedConfig({**json.loads(json.dumps(config)), "train_batch_size": batch}, mpu=one_rank)
    except Exception as error:  # assertions, errors of its own, and whatever its getters stumble over
        raise UserError(f"{path}: DeepSpeed refuses this file: {error or type(error).__name__}.") from None


def _check_section(value: Any, path: Path, name: str) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{path}: {name} must be a mapping of keys in braces, not {shown(value)}.")


def _refuse_auto(value: Any, path: Path, key: str) -> None:
    if value == "auto":
        raise UserError(f'{path}: {key} cannot be "auto": nothing in the recipe says what it is.')
    if isinstance(value, dict):
        for name, inner in value.items():
            _refuse_auto(inner, path, f"{key}.{name}".lstrip("."))


def choose_accelerator() -> None:
    """Tell DeepSpeed, before it is imported, what it would otherwise guess with a warning."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def check_zero_section(config: dict[str, Any], path: Path) -> int:
    """Validate `zero_optimization` by DeepSpeed's own model; returns the stage."""
    return int(_zero_section(config, path).stage)


@dataclass(frozen=True)
class ZeroBuffers:
    """Elements of what ZeRO keeps beside weights, gradients and states.

    Its buckets of gradients, all together; at stage 3 the most weights that are gathered at a time, and those of one
    collective; and one bucket, where gradients travel in fp32.
    """

    gradients: int = 0
    live: int = 0
    prefetched: int = 0
    in_fp32: int = 0


def zero_buffers(config: dict[str, Any], path: Path) -> ZeroBuffers:
    """The buffers that a DeepSpeed file asks for."""
    section = _zero_section(config, path)
    is_double = section.overlap_comm and section.stage in (1, 2)  # one is filled while the other travels
    gradients = int(section.reduce_bucket_size) * (2 if is_double else 1)
    is_fp32 = section.stage and config.get("communication_data_type") == "fp32"
    in_fp32 = int(section.reduce_bucket_size) if is_fp32 else 0
    return ZeroBuffers(gradients, int(section.max_live_parameters), int(section.prefetch_bucket_size), in_fp32)


def _zero_section(config: dict[str, Any], path: Path) -> Any:
    choose_accelerator()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    checked = validated(DeepSpeedZeroConfig, config.get("zero_optimization", {}), path, "zero_optimization")
    for key in ("reduce_bucket_size", "allgather_bucket_size", "prefetch_bucket_size"):
        if getattr(checked, key) > MAX_BUCKET:
            raise UserError(f"{path}: zero_optimization.{key} is more than {MAX_BUCKET:,} elements: lower it.")
    if not checked.compute_grad_norm:
        raise UserError(f"{path}: zero_optimization.compute_grad_norm: {UNCHECKED}: leave it out.")
    if checked.round_robin_gradients:  # DeepSpeed 0.19 then returns the wrong parameters' weights
        raise UserError(f"{path}: zero_optimization.round_robin_gradients would spoil checkpoints: leave it out.")
    if checked.offload_optimizer and checked.offload_optimizer.device != "none":
        raise UserError(f"{path}: zero_optimization.offload_optimizer needs DeepSpeed's own AdamW: leave it out.")
    if checked.offload_param and checked.offload_param.device == "nvme":
        raise UserError(
            f"{path}: zero_optimization.offload_param must have device cpu: nvme is not read by checkpoints."
        )
    return checked


def stated_precision(config: dict[str, Any], path: Path) -> str:
    """bf16 or fp16 where the file enables it or leaves it open ("auto"), else fp32."""
    for name in ("bf16", "fp16"):
        section = config.get(name, {})
        _check_section(section, path, name)
        if section.get("enabled") in (True, "auto"):
            return name
    return "fp32"


def tensor_parallel_size(config: dict[str, Any], path: Path) -> int:
    """`tensor_parallel.autotp_size`, 1 where it is not given. The file cannot say how layers are split."""
    section = config.get("tensor_parallel", {})
    _check_section(section, path, "tensor_parallel")
    if other := sorted(section.keys() - {"autotp_size"}):
        raise UserError(f"{path}: tensor_parallel.{other[0]} is not set here: only autotp_size is.")
    size = section.get("autotp_size", 1)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise UserError(f"{path}: tensor_parallel.autotp_size is {shown(size)}: it must be a whole number from 1 on.")
    return size
