"""Ctrl-C, and what stops all ranks alike: one message, no stack trace."""

from __future__ import annotations

import functools
import signal
import socket
import subprocess
import sys

import pytest
from distributed_harness import quiet_environment
from shard_maker import ROOT

from mlcd_ds.errors import INTERRUPTED

TIMEOUT_S = 120

FOREVER = """
import sys
from mlcd_ds.stages.runner import guarded
def run(context):
    sys.stdout.write("ready\\n")
    sys.stdout.flush()
    while True:
        context.group.barrier()
sys.exit(guarded(run))
"""

ONE_FAILS = """
import sys
from mlcd_ds.errors import UserError
from mlcd_ds.stages.runner import guarded
def run(context):
    if context.group.rank == int(sys.argv[1]):
        raise UserError("a shard is broken")
    while True:
        context.group.barrier()
sys.exit(guarded(run))
"""

IMPORTING = """
import sys
class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
from mlcd_ds.cli import main
sys.exit(main(["embed"]))
"""


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(arguments: list[str], num_ranks: int, port: int) -> list[subprocess.Popen]:
    """The same command on every rank."""
    processes = []
    for rank in range(num_ranks):
        environment = {**quiet_environment(), "PYTHONPATH": str(ROOT)}
        if num_ranks > 1:
            environment |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1"}
            environment |= {"MASTER_PORT": str(port)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # A shell's background jobs ignore Ctrl-C, and so would what they start.
        heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        command = [sys.executable, *arguments]
        processes.append(subprocess.Popen(command, env=environment, preexec_fn=heed, **pipes))
    return processes


def finish(processes: list[subprocess.Popen]) -> tuple[list[int], str]:
    """Exit statuses, and what all of them wrote to stderr."""
    try:
        errors = [process.communicate(timeout=TIMEOUT_S)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], "".join(errors)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ctrl_c_ends_with_one_message(num_ranks: int, free_port: int) -> None:
    processes = start(["-c", FOREVER], num_ranks, free_port)
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * num_ranks
    for process in processes:
        process.send_signal(signal.SIGINT)
    assert finish(processes) == ([130] * num_ranks, INTERRUPTED + "\n")


def test_ctrl_c_while_importing() -> None:
    assert finish(start(["-c", IMPORTING], 1, 0)) == ([130], INTERRUPTED + "\n")


@pytest.mark.parametrize("arguments", [["plan", "train.stepz=1"], ["plan", "--gpus", "none"]])
def test_what_stops_all_ranks_is_told_once(arguments: list[str], free_port: int) -> None:
    statuses, errors = finish(start(["-m", "mlcd_ds", *arguments], 2, free_port))
    assert statuses == [2, 2] and errors.count("error: ") == 1 and "Traceback" not in errors, errors


@pytest.mark.parametrize("failing", [0, 1])
def test_the_message_of_one_rank_is_not_buried_by_the_others(failing: int, free_port: int) -> None:
    statuses, errors = finish(start(["-c", ONE_FAILS, str(failing)], 2, free_port))
    assert statuses == ([2, 1] if failing == 0 else [1, 2])
    assert "error: a shard is broken" in errors and "Traceback" not in errors, errors
