"""Being asked to stop: Slurm's USR1 ahead of a time limit, and TERM at a preemption."""

from __future__ import annotations

import signal
from types import TracebackType

import torch

from mlcd_ds.distributed.collectives import Group

EXIT_REQUEUE = 85  # "saved, start me again": what slurm/ looks for
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """A context in which the stop signals are noted instead of ending the process.

    Entered before data are opened and models built, so that a signal during start-up is not lost.
    """

    def __init__(self) -> None:
        self._asked = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self._asked = True

    def is_asked(self, group: Group) -> bool:
        """Whether any rank was asked to stop: all must agree. Collective, on the host."""
        return bool(group.all_reduce_max(torch.tensor([float(self._asked)])).item())
