"""First centres: the same on any number of ranks, and with the geometry of the k-means centres."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from distributed_harness import assert_close, assert_differs, run_ranks
from torch import Tensor

from mlcd_ds.distributed.collectives import Group
from mlcd_ds.heads.center_init import projected_centers
from mlcd_ds.heads.class_shards import class_range

NUM_CLASSES, WIDTH = 23, 8


def teacher_centers() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    scales = torch.linspace(2.0, 0.2, WIDTH)  # well separated directions
    return F.normalize(torch.randn(NUM_CLASSES, WIDTH, generator=generator) * scales + 0.5, dim=1)


def on_rank(group: Group, dim: int) -> Tensor:
    classes = class_range(NUM_CLASSES, group.size, group.rank)
    return projected_centers(teacher_centers()[classes.begin : classes.end], NUM_CLASSES, dim, 0.01, group)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_projection_is_principal_components_on_any_number_of_ranks(num_ranks: int) -> None:
    got = torch.cat(run_ranks(on_rank, num_ranks, 5))
    rows = teacher_centers().double()
    rows = rows - rows.mean(0)
    directions = torch.linalg.svd(rows, full_matrices=False).Vh[:5]  # an independent way to the same directions
    expected = F.normalize(rows @ directions.T, dim=1)
    # Signs of directions are arbitrary, cosines between classes are not.
    unit = F.normalize(got.double(), dim=1)
    assert_close("cosines between classes", unit @ unit.T, expected @ expected.T, 1e-6)  # measured 6e-8
    assert_close("lengths", got.norm(dim=1), torch.full((NUM_CLASSES,), 0.01 * 5**0.5), 1e-6)
    uncentred = F.normalize(teacher_centers().double() @ directions.T, dim=1)
    assert_differs("the mean not taken off", unit @ unit.T, uncentred @ uncentred.T, 1e-3)


def test_a_wider_embedding_is_padded_and_keeps_all_cosines() -> None:
    got = run_ranks(on_rank, 1, WIDTH + 3)[0].double()
    rows = teacher_centers().double()
    rows = F.normalize(rows - rows.mean(0), dim=1)
    assert got.shape == (NUM_CLASSES, WIDTH + 3) and not got[:, WIDTH:].any()
    assert_close("cosines", F.normalize(got, dim=1) @ F.normalize(got, dim=1).T, rows @ rows.T, 1e-6)
