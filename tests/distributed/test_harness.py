"""The tests' own tools: errors, hangs and vacuous comparisons must not pass."""

from __future__ import annotations

import os
import time

import pytest
import torch
from distributed_harness import RankError, assert_close, assert_differs, run_ranks

from mlcd_ds.distributed.collectives import Group


def collectives(group: Group) -> dict[str, object]:
    rows_B = torch.tensor([[10.0 * group.rank], [10.0 * group.rank + 1]])
    rows_G = torch.arange(2.0 * group.size) + 100 * group.rank
    return {
        "threads": torch.get_num_threads(),
        "gathered": group.all_gather(rows_B),
        "scattered": group.reduce_scatter_sum(rows_G),
        "sum": group.all_reduce_sum(torch.tensor([float(group.rank)])),
        "max": group.all_reduce_max(torch.tensor([float(group.rank)])),
        "objects": group.gather_objects({"rank": group.rank}),
        "is_main": group.is_main,
    }


def fail_on_rank_1(group: Group) -> None:
    if group.rank == 1:
        raise KeyError("which rank")
    group.barrier()


def hang(group: Group) -> None:
    time.sleep(3600)


def die(group: Group) -> None:
    os._exit(7)


def test_collectives_on_three_ranks() -> None:
    results = run_ranks(collectives, 3)
    for rank, result in enumerate(results):
        assert result["threads"] == 1
        assert result["gathered"].flatten().tolist() == [0, 1, 10, 11, 20, 21]
        assert result["scattered"].tolist() == [300 + 3 * (2 * rank), 300 + 3 * (2 * rank + 1)]
        assert (result["sum"].item(), result["max"].item()) == (3, 2)
        assert result["objects"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert result["is_main"] == (rank == 0)


def test_a_ranks_error_comes_back_with_its_traceback() -> None:
    with pytest.raises(KeyError, match="which rank") as caught:
        run_ranks(fail_on_rank_1, 2)
    assert isinstance(caught.value.__cause__, RankError)
    assert "rank 1 of 2" in str(caught.value.__cause__) and "fail_on_rank_1" in str(caught.value.__cause__)


def test_a_hang_ends_at_the_timeout() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[0\]"):
        run_ranks(hang, 1, timeout_s=6.0)


def test_a_rank_that_dies_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"\[7\]"):
        run_ranks(die, 1)


def test_comparisons_refuse_what_proves_nothing() -> None:
    x = torch.tensor([1.0, 2.0])
    assert_close("x", x, x + 1e-8, 1e-6)
    for got, expected in [(x, x), (x, x[:]), (x[:1], x), (x * float("nan"), x), (x, x * float("nan"))]:
        with pytest.raises(AssertionError):
            assert_close("x", got, expected, 1.0)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close("x", x, x + 1e-3, 1e-6)
    assert_differs("x", x, x + 1e-3, 1e-6)
    with pytest.raises(AssertionError, match="known-bad"):
        assert_differs("x", x, x + 1e-6, 1e-6)
