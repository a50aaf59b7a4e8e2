"""The head's state on disk: centres, moments and step by class range, so that any number of ranks can read it.

One safetensors file a writing rank, `head-BEGIN-END.safetensors`, with `weight`, `exp_avg`, `exp_avg_sq` [rows, E] of
the classes BEGIN ... END - 1 and the optimizer's `step`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from mlcd_ds.errors import UserError
from mlcd_ds.heads.partial_fc import PartialFCHead
from mlcd_ds.manifest import write_atomic

MOMENTS = ("exp_avg", "exp_avg_sq")
FILE_NAME = re.compile(r"head-(\d+)-(\d+)\.safetensors")


def save_head(folder: Path, head: PartialFCHead, optimizer: torch.optim.Optimizer) -> None:
    """Write this rank's classes."""
    state = optimizer.state[head.weight_LE]
    tensors = {"weight": head.weight_LE.detach(), "step": state["step"].reshape(1)}
    tensors.update({name: state[name] for name in MOMENTS})
    content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    path = folder / f"head-{head.classes.begin:010d}-{head.classes.end:010d}.safetensors"
    write_atomic(path, lambda file: file.write(content))


def load_head(folder: Path, head: PartialFCHead, optimizer: torch.optim.Optimizer) -> None:
    """Read this rank's classes from whichever files hold them. UserError names a damaged file or the gap."""
    device, dim = head.weight_LE.device, head.weight_LE.shape[1]
    parts = {name: [torch.empty(0, dim)] for name in ("weight", *MOMENTS)}
    step, reached = torch.zeros(1), head.classes.begin
    for path, begin, end in head_files(folder):
        first, last = max(begin, reached), min(end, head.classes.end)
        if begin > reached or first >= last:
            continue
        try:
            with safe_open(path, framework="pt") as file:
                for name, rows in parts.items():
                    rows.append(file.get_slice(name)[first - begin : last - begin])
                step = file.get_tensor("step")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({error}): remove {folder} to use an older checkpoint.") from None
        reached = last
    if reached != head.classes.end:
        raise UserError(
            f"{folder}: no head file holds classes {reached} to {head.classes.end - 1}: a shard is missing."
        )
    with torch.no_grad():
        head.weight_LE.copy_(torch.cat(parts["weight"]))
    moments = {name: torch.cat(parts[name]).to(device) for name in MOMENTS}
    optimizer.state[head.weight_LE] = {"step": step.reshape(()).clone(), **moments}


def head_files(folder: Path) -> Iterator[tuple[Path, int, int]]:
    """Path, first class and end of every head file, by first class."""
    for path in sorted(folder.glob("head-*.safetensors")):
        if match := FILE_NAME.fullmatch(path.name):
            yield path, int(match[1]), int(match[2])
