"""Asked to stop, all ranks stop at the same step, and nobody waits for another's answer."""

from __future__ import annotations

import os
import signal

import torch.distributed as dist
from distributed_harness import run_ranks

from mlcd_ds.distributed.collectives import Group
from mlcd_ds.distributed.stopping import StopRequest

ASKED_AT = (7, 3, 5)  # the steps at which ranks get their signals
LAST = 20


class Alone(StopRequest):
    """The known-bad twin: each rank goes by its own signals."""

    def was_asked(self, group: Group) -> bool:
        return self._asked


def stops(group: Group, kind: type[StopRequest]) -> int:
    """The step after which this rank stops."""
    with kind() as stop:
        for step in range(LAST):
            if step == ASKED_AT[group.rank]:
                os.kill(os.getpid(), signal.SIGUSR1)
            if stop.was_asked(group):
                break
    group.barrier()
    return step


def test_all_stop_one_step_after_the_first_signal() -> None:
    assert run_ranks(stops, 3, StopRequest) == [min(ASKED_AT) + 1] * 3
    assert run_ranks(stops, 3, Alone) == list(ASKED_AT)


def ask_without_waiting(group: Group) -> bool:
    """Rank 0 asks, and only then tells rank 1 to ask."""
    store = dist.distributed_c10d._get_default_store()
    with StopRequest() as stop:
        if group.rank == 1:
            store.wait(["asked"])
        asked = stop.was_asked(group)
        if group.rank == 0:
            store.set("asked", "once")
        asked |= stop.was_asked(group)
    group.barrier()
    return asked


def test_a_question_does_not_wait_for_the_others() -> None:
    assert run_ranks(ask_without_waiting, 2) == [False, False]
