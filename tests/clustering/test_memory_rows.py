"""Rows in memory, cut over ranks, and their principal components."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from distributed_harness import assert_close, assert_differs, run_ranks
from torch import Tensor

from mlcd_ds.clustering import principal
from mlcd_ds.clustering.memory_rows import MemoryRows, Share
from mlcd_ds.clustering.principal import principal_components
from mlcd_ds.clustering.row_sampling import Sample
from mlcd_ds.distributed.collectives import Group

NUM_ROWS, DIM = 41, 7


def all_rows() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(NUM_ROWS, DIM, generator=generator) * torch.arange(1, DIM + 1) + 20


def read(group: Group, num_rows: int) -> dict[str, object]:
    rows, share = all_rows()[:num_rows], Share.of(num_rows, group)
    mine = rows[share.first : share.first + share.count].clone()
    store, sample = MemoryRows(mine, share), Sample(0.5, 3)
    picked = np.array([num_rows - 1, 0, num_rows // 2, 0])
    found: dict[str, object] = {"gathered": share.gather(mine, group), "padded": share.padded}
    found["picked"] = group.all_reduce_sum(store.pick(store.numbers(picked)))
    for name, which in (("blocks", None), ("sample", sample)):
        blocks = list(store.blocks(4, which))
        assert all(len(numbers) == len(block) <= 4 for numbers, block in blocks)
        found[name] = [(int(n), row) for numbers, block in blocks for n, row in zip(numbers, block, strict=True)]
    principal.BLOCK_ROWS = 8  # of this process; it divides no rank's rows
    found["components"] = share.gather(principal_components(mine, num_rows, 3, group), group)
    return found


@pytest.mark.parametrize(("num_ranks", "num_rows"), [(1, 41), (2, 41), (3, 41), (3, 4)])
def test_rows_of_all_ranks_are_all_rows(num_ranks: int, num_rows: int) -> None:
    rows, ranks = all_rows()[:num_rows], run_ranks(read, num_ranks, num_rows)
    for name in ("blocks", "sample"):
        read_rows = [pair for found in ranks for pair in found[name]]
        wanted = np.arange(num_rows)
        wanted = wanted[Sample(0.5, 3).contains(wanted)] if name == "sample" else wanted
        assert [number for number, _ in read_rows] == wanted.tolist()
        assert all(torch.equal(row, rows[number]) for number, row in read_rows)
    centred = rows.double() - rows.double().mean(dim=0)
    _, _, basis = torch.linalg.svd(centred)
    expected = centred @ basis[:3].T
    for found in ranks:
        assert torch.equal(found["gathered"], rows)
        assert torch.equal(found["picked"], rows[[num_rows - 1, 0, num_rows // 2, 0]])
        assert len(found["padded"]) == -(-num_rows // num_ranks) and found["padded"].max() < num_rows
        signs = (found["components"].double() * expected).sum(dim=0).sign()
        assert_close("components", found["components"] * signs, expected, 1e-5)
        assert_differs("other components", found["components"] * signs, expected.flip(1), 1e-3)
