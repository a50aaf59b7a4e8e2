"""A group whose collectives behave as NCCL's do, on a CPU: they return at once, and are done some time later.

    stream     a thread of each rank that runs its collectives in order, over gloo groups of its own. Not before the
               rank's next call or wait, so that a result is never there already; until then it is filled with NaN.
    operators  a torch operator on such a result waits for it, as a kernel in the same CUDA stream would, and so does
               reading it (`item`, `numpy`). Only Python's own control flow does not.
    slow rank  holds back its files until another rank waits for it on the host, or has nothing left to do.

DeepSpeed's own collectives are plain gloo. Unlike on a GPU the host waits for the operators, too.
"""

from __future__ import annotations

import functools
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mlcd_ds.distributed.collectives import Group

T = TypeVar("T")
POLL_S = 0.001


class Stream:
    """Runs jobs in order, in a thread."""

    def __init__(self) -> None:
        self._held: list[Callable[[], None]] = []  # until the rank's next call or wait
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._pending: dict[int, threading.Event] = {}  # by the storage that is written
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            self._jobs.get()()

    def put(self, job: Callable[[], Tensor], output: Tensor) -> None:
        """`output` becomes what `job` returns, later."""
        self.release()
        done, place = threading.Event(), output.untyped_storage().data_ptr()
        output.fill_(float("nan") if output.is_floating_point() else torch.iinfo(output.dtype).min)

        def run() -> None:
            with torch.no_grad():
                output.copy_(job())
            done.set()
            self._pending.pop(place, None)

        self._pending[place] = done
        self._held.append(run)

    def release(self) -> None:
        """Let the jobs so far run."""
        while self._held:
            self._jobs.put(self._held.pop(0))

    def wait_for(self, values: object) -> None:
        """Wait for those of some tensors that are being written."""
        for value in tree_iter(values) if self._pending else ():
            if isinstance(value, Tensor):
                self._wait(value)

    def _wait(self, tensor: Tensor) -> None:
        try:
            done = self._pending.get(tensor.untyped_storage().data_ptr())
        except (RuntimeError, NotImplementedError):  # a tensor without memory
            return
        if done:
            self.release()
            done.wait()


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":  # DeepSpeed's: it will wait for ranks that may wait for this one's
            STREAM.release()
        STREAM.wait_for((args, kwargs))
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    """What reaches no operator: `numpy`, `cpu` of what is there already."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.untyped_storage.__get__ and STREAM._pending:
            with torch._C.DisableTorchFunction():
                STREAM.wait_for((args, kwargs))
        return func(*args, **(kwargs or {}))


STREAM: Stream


@contextmanager
def stream() -> Iterator[None]:
    """This process has a stream, which its operators keep to."""
    global STREAM
    STREAM = Stream()
    with _Operators(), _Calls():
        yield
        STREAM.release()


@functools.cache
def twin(process_group: dist.ProcessGroup) -> Group:
    """The stream's own group of the same ranks."""
    ranks = dist.get_process_group_ranks(process_group)
    return Group(dist.new_group(ranks, use_local_synchronization=True))


@dataclass(frozen=True)
class DeferredGroup(Group):
    """See above. `told` is how ranks see each other wait: the number of each one's wait on the host."""

    told: np.ndarray | None = field(default=None, compare=False)

    def _later(self, output: Tensor, collective: Callable[[Group, Tensor], Tensor], given: Tensor) -> Tensor:
        group, copy = twin(self.process_group), given.detach().clone()
        STREAM.put(lambda: collective(group, copy), output)
        return output

    def all_gather(self, rows_B: Tensor) -> Tensor:
        rows_G = rows_B.new_empty((self.size * len(rows_B), *rows_B.shape[1:]))
        return self._later(rows_G, Group.all_gather, rows_B)

    def reduce_scatter_sum(self, rows_G: Tensor) -> Tensor:
        rows_B = rows_G.new_empty((len(rows_G) // self.size, *rows_G.shape[1:]))
        return self._later(rows_B, Group.reduce_scatter_sum, rows_G)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        return self._later(values, Group.all_reduce_sum, values)

    def all_reduce_max(self, values: Tensor) -> Tensor:
        return self._later(values, Group.all_reduce_max, values)

    def exchange(self, parts: Sequence[Tensor]) -> Tensor:
        lengths = torch.tensor([len(part) for part in parts])
        count = int(self.all_gather(lengths[None])[:, self.rank].sum())
        received = parts[0].new_empty((count, *parts[0].shape[1:]))
        split = lengths.tolist()
        return self._later(received, lambda group, rows: group.exchange(rows.split(split)), torch.cat(list(parts)))

    def max_on_host(self, value: float) -> float:
        self._tell()
        return super().max_on_host(value)

    def gather_objects(self, item: T) -> list[T]:
        self._tell()
        return super().gather_objects(item)

    def _tell(self) -> None:
        STREAM.release()
        if self.told is not None:
            self.told[self.rank] += 1


@dataclass(frozen=True)
class OldBarrierGroup(DeferredGroup):
    """The known-bad twin: a barrier by a collective of the device, which nobody waits for."""

    num_barriers: list[None] = field(default_factory=list, compare=False)

    def barrier(self) -> None:
        self.num_barriers.append(None)
        self.all_reduce_sum(torch.zeros(1))

    def catch_up(self) -> None:
        """A rank that an error took out of a stage makes the calls that it has missed. Collective."""
        most = max(self.gather_objects(len(self.num_barriers)))
        while len(self.num_barriers) < most:
            self.barrier()


HELD_FILES = (".done/", "manifest.json", "checkpoints/step_")


class SlowFiles:
    """Of `slow_rank` files come late: only when another rank waits on the host for a call that it has not made."""

    def __init__(self, group: DeferredGroup) -> None:
        assert group.told is not None
        self._told, self._own, self.slow_rank = group.told, group.rank, -1
        self.num_held = 0
        sys.addaudithook(self._at)
        self._save = safetensors.torch.serialize_file
        safetensors.torch.serialize_file = self._save_late

    def _at(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "os.rename" and any(part in str(args[1]) for part in HELD_FILES):
            self._hold()

    def _save_late(self, tensors: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        self._hold()
        self._save(tensors, path, *args, **kwargs)

    def _hold(self) -> None:
        if self.slow_rank == self._own:
            self.num_held += 1
            STREAM.release()
            while self._told.max() <= self._told[self._own]:
                time.sleep(POLL_S)


def told_of(folder: Path, num_ranks: int) -> np.ndarray:
    """The ranks' common notes on a file."""
    path = folder / "told"
    with open(path, "ab") as file:  # all make it, none empties it
        file.truncate(8 * num_ranks)
    return np.memmap(path, np.int64, "r+", shape=(num_ranks,))
