"""The head's state on disk: centres, moments and steps by class range, so that any number of ranks can read it.

One safetensors file a writing rank, `head-BEGIN-END.safetensors`, with the rows of the classes BEGIN ... END - 1:
`weight` [rows, E], the optimizer's moments [rows, E], and `step` int32 [rows], how often a row was moved.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mlcd_ds.artefacts.readers import open_tensors
from mlcd_ds.errors import UserError
from mlcd_ds.heads.partial_fc import PartialFCHead
from mlcd_ds.heads.row_optimizer import RowOptimizer

FILE_NAME = re.compile(r"head-(\d+)-(\d+)\.safetensors")


def save_head(folder: Path, head: PartialFCHead, optimizer: RowOptimizer) -> None:
    """Write this rank's classes; among ranks that hold the same classes only the first writes."""
    if head.groups.replicas and not head.groups.replicas.is_main:
        return
    path = folder / f"head-{head.classes.begin:010d}-{head.classes.end:010d}.safetensors"
    tensors = {name: tensor.cpu().contiguous() for name, tensor in _state(head, optimizer).items()}
    try:
        save_file(tensors, path)  # from the tensors' own memory: there is no room for another copy of the head
    except SafetensorError as error:
        raise OSError(str(error)) from None


def load_head(folder: Path, head: PartialFCHead, optimizer: RowOptimizer | None) -> None:
    """Read this rank's classes from whichever files hold them; without an optimizer the centres alone.

    UserError names a damaged file or the gap.
    """
    targets, reached = _state(head, optimizer), head.classes.begin
    for path, begin, end in [*head_files(folder), (None, head.classes.num_classes, head.classes.num_classes)]:
        if reached < min(begin, head.classes.end):
            raise UserError(
                f"{folder}: no head file holds classes {reached} to {begin - 1}: "
                f"head-{reached:010d}-{begin:010d}.safetensors is missing. Remove {folder} to use an older checkpoint."
            )
        last = min(end, head.classes.end)
        if path and reached < last:
            _read_rows(path, begin, end, slice(reached, last), targets, head.classes.begin)
            reached = last


def _state(head: PartialFCHead, optimizer: RowOptimizer | None) -> dict[str, Tensor]:
    return {"weight": head.weight_LE.detach(), **(optimizer.state if optimizer else {})}


def _read_rows(path: Path, begin: int, end: int, classes: slice, targets: dict[str, Tensor], first_target: int) -> None:
    """Copy rows of one file, which holds classes [begin, end), to their places."""
    fix = f"Remove {path.parent} to use an older checkpoint."
    with open_tensors(path, fix) as file:
        missing = sorted(targets.keys() - file.names)
        if missing:
            raise UserError(
                f"{path} holds no {missing[0]!r}: it was saved with another head.optimizer. Set that one. Or: {fix}"
            )
        for name, target in targets.items():
            expected = [end - begin, *target.shape[1:]]
            if file.shape(name) != expected:
                raise UserError(f"{path}: {name!r} has shape {file.shape(name)} instead of {expected}. {fix}")
            # Straight to its place: no rank ever holds more than its own classes.
            target[classes.start - first_target : classes.stop - first_target] = file.rows(
                name, classes.start - begin, classes.stop - begin
            )


def head_files(folder: Path) -> Iterator[tuple[Path, int, int]]:
    """Path, first class and end of every head file, by first class."""
    for path in sorted(folder.glob("head-*.safetensors")):
        if match := FILE_NAME.fullmatch(path.name):
            yield path, int(match[1]), int(match[2])
