"""Run a function on several gloo ranks, and compare tensors so that a comparison cannot pass by accident.

Also what tests import beside fixtures: every folder has a conftest, so none can be imported by that name.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mlcd_ds.distributed.collectives import Group

POLL_S = 0.02
COLLECTIVE_TIMEOUT_S = 60.0


class RankError(Exception):
    """Holds the traceback of a rank as text; the cause of the exception that `run_ranks` raises again."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def run_ranks(function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """`function(group, *args)` on `num_ranks` fresh processes; their results in rank order.

    `function` stands at the top of a module. The first error of a rank is raised again here with its traceback, and
    TimeoutError after `timeout_s`; no rank survives either way.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        # Through a file: multiprocessing would put the tensors into shared memory.
        (folder / "call").write_bytes(pickle.dumps((function, args)))
        ranks = [context.Process(target=_run_rank, args=(folder, rank, num_ranks)) for rank in range(num_ranks)]
        deadline = time.monotonic() + timeout_s
        try:
            for process in ranks:
                process.start()
            while any(process.is_alive() for process in ranks):
                if any(process.exitcode for process in ranks):
                    break
                if time.monotonic() > deadline:
                    alive = [rank for rank, process in enumerate(ranks) if process.is_alive()]
                    raise TimeoutError(f"ranks {alive} of {num_ranks} still ran after {timeout_s} s")
                time.sleep(POLL_S)
        finally:
            for process in ranks:
                if process.pid is not None:
                    process.kill()
                    process.join()
        _raise_first_error(folder, [process.exitcode for process in ranks])
        return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(num_ranks)]


def _run_rank(folder: Path, rank: int, num_ranks: int) -> None:
    torch.set_num_threads(1)
    try:
        function, args = pickle.loads((folder / "call").read_bytes())
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(folder / "store"), num_ranks),
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
        )
        dist.all_reduce(torch.zeros(1))  # all are connected: a rank that ends early would break the others' connecting
        result = function(Group(dist.group.WORLD), *args)
        (folder / f"result{rank}").write_bytes(pickle.dumps(result))
        dist.destroy_process_group()
    except BaseException as error:
        text = f"rank {rank} of {num_ranks}:\n{traceback.format_exc()}"
        partial = folder / f"partial{rank}"
        partial.write_bytes(pickle.dumps((text, _picklable(error))))
        partial.rename(folder / f"error{rank}")
        raise SystemExit(1) from None


def _picklable(error: BaseException) -> BaseException | None:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return None
    return error


def _raise_first_error(folder: Path, exit_codes: list[int | None]) -> None:
    """The earliest error: later ones only tell that a peer went away."""
    errors = sorted(folder.glob("error*"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        text, error = pickle.loads(errors[0].read_bytes())
        raise error or RuntimeError("a rank failed") from RankError(text)
    if any(exit_codes):
        raise RuntimeError(f"exit codes of the ranks: {exit_codes}, without a Python error")


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference, over the largest magnitude expected (or 1e-30)."""
    expected = expected.double()
    if not expected.numel():
        return 0.0
    return float((got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def assert_close(name: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """`relative_error` is at most `tolerance`. Refuses a tensor compared with itself, other shapes, and NaNs."""
    _check_comparable(name, got, expected)
    error = relative_error(got, expected)
    assert error <= tolerance, f"{name}: relative error {error:.2e} is above {tolerance:.0e}"


def assert_differs(name: str, got: Tensor, known_bad: Tensor, tolerance: float) -> None:
    """The twin of `assert_close`: a known-bad value must miss by ten times the tolerance."""
    _check_comparable(name, got, known_bad)
    error = relative_error(got, known_bad)
    assert error > 10 * tolerance, f"{name}: a known-bad value passes, relative error {error:.2e}"


def _check_comparable(name: str, got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape, f"{name}: shapes {tuple(got.shape)} and {tuple(expected.shape)}"
    same = got.numel() > 0 and got.untyped_storage().data_ptr() == expected.untyped_storage().data_ptr()
    assert not same, f"{name}: a tensor is compared with itself"
    assert torch.isfinite(got).all(), f"{name}: not finite"
    assert torch.isfinite(expected).all(), f"{name}: what is expected is not finite"


def of_whole_batch(ranks: list[dict[str, Tensor]], rows: Collection[str], sums: Collection[str]) -> dict[str, Tensor]:
    """What the ranks have found, together: `rows` one after the other, `sums` added up; the rest is equal on all."""
    whole = {}
    for name, value in ranks[0].items():
        if name in rows:
            whole[name] = torch.cat([rank[name] for rank in ranks])
        elif name in sums:
            whole[name] = torch.stack([rank[name] for rank in ranks]).sum(dim=0)
        else:
            assert all(torch.equal(rank[name], value) for rank in ranks), name
            whole[name] = value
    return whole


class TensorSizes(TorchDispatchMode):
    """While it is active: elements of every tensor that an operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.sizes.extend(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out


@dataclass(frozen=True)
class TinyData:
    """Folders of the stages before training, over `NUM_IMAGES` images in one shard."""

    shard: Path
    index: Path
    embeddings: Path
    clusters: Path
    labels: Path


def quiet_environment() -> dict[str, str]:
    """For child processes: one thread each, no launcher's variables, plain CPU."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in launchers}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
