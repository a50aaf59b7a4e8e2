"""Where the time of a step goes."""

from __future__ import annotations

import time
from itertools import pairwise

import torch

PARTS = ("data", "forward", "head", "backward", "optimizer", "other")
"""Waiting for images; the towers' passes; the objective's loss and gradients ("head"), collectives among them; all
optimizers, with what DeepSpeed and the head's side stream have left to do by then; the rest. Where an objective has
phases of several steps, also what begins one ("phase")."""


class StepClock:
    """Splits steps into parts, which add up to them: a mark ends one part and begins the next.

    On a GPU marks are events in the current stream, and nothing waits for them before `read`: a part is then the time
    that the stream took. What a side stream does beside it is not seen.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: list[tuple[str | None, float | torch.cuda.Event]] = []
        self._wait_s = 0.0

    def start(self) -> None:
        """Begin a step; the time since the last one belongs to no part."""
        self._marks.append((None, self._now()))

    def mark(self, part: str) -> None:
        """Set a mark; the time since the last one belongs to `part`."""
        self._marks.append((part, self._now()))

    def read(self) -> dict[str, float]:
        """Mean seconds of a step, by part, since the last `read`, and of the whole "step". The host waits."""
        totals = dict.fromkeys(PARTS, 0.0)
        num_steps = sum(part is None for part, _ in self._marks)
        if self._marks and isinstance(last := self._marks[-1][1], torch.cuda.Event):
            last.synchronize()
        for (_, begin), (part, end) in pairwise(self._marks):
            if part is not None:
                totals[part] = totals.get(part, 0.0) + seconds_between(begin, end)
        self._marks.clear()
        means = {part: total / max(1, num_steps) for part, total in totals.items()}
        return means | {"step": sum(means.values())}

    def add_wait(self, seconds: float) -> None:
        """The host has waited for images."""
        self._wait_s += seconds

    def take_wait(self) -> float:
        """Seconds that the host has waited for images since the last call."""
        taken, self._wait_s = self._wait_s, 0.0
        return taken

    def _now(self) -> float | torch.cuda.Event:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def seconds_between(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    """Seconds from one mark to another, both completed."""
    if isinstance(begin, float):
        assert isinstance(end, float)
        return end - begin
    assert isinstance(end, torch.cuda.Event)
    return begin.elapsed_time(end) / 1e3
