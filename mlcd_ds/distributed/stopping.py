"""Being asked to stop: Slurm's USR1 ahead of a time limit, and TERM at a preemption."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import TracebackType
from typing import Any

from mlcd_ds.distributed.collectives import Group

EXIT_REQUEUE = 85  # "saved, start me again": what slurm/ looks for
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """A context in which the stop signals are noted instead of ending the process.

    Entered before data are opened and models built, so that a signal during start-up is not lost.
    """

    def __init__(self) -> None:
        self._asked = False
        self._previous: dict[int, Any] = {}
        self._answer: Callable[[], float] | None = None  # gives the answer to the latest `was_asked`

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
        """Whether any rank was asked to stop: all must agree. Collective: the host waits for all ranks."""
        return group.max_on_host(float(self._asked)) > 0

    def was_asked(self, group: Group) -> bool:
        """Whether any rank had been asked to stop at the call before this one; the first call says no. Collective.

        For every step of a training: answers travel while a step is computed, so nobody waits for them.
        """
        answer, self._answer = self._answer, group.start_max_on_host(float(self._asked))
        return answer is not None and answer() > 0
