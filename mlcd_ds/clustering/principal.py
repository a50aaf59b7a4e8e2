"""Principal components of rows of all ranks.

N rows of this rank, E width, D components.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlcd_ds.distributed.collectives import Group

BLOCK_ROWS = 8192


def principal_components(rows_NE: Tensor, num_rows: int, dim: int, group: Group) -> Tensor:
    """[N, D], D = `dim` or E if that is smaller: each row's coordinates along the directions in which the `num_rows`
    rows of all ranks vary most, about their mean; the same on any number of ranks. Products are in the rows' precision.
    Collectives: all-reduces of [E], [E, E] and [E, D] fp64."""
    mean_E = group.all_reduce_sum(rows_NE.sum(dim=0, dtype=torch.float64)) / num_rows
    covariance_EE = torch.zeros(rows_NE.shape[1], rows_NE.shape[1], dtype=torch.float64, device=rows_NE.device)
    for block_BE in rows_NE.split(BLOCK_ROWS):
        centred_BE = block_BE - mean_E.to(block_BE.dtype)
        covariance_EE += (centred_BE.T @ centred_BE).double()
    group.all_reduce_sum(covariance_EE)
    basis_ED = torch.linalg.eigh(covariance_EE).eigenvectors.flip(1)[:, :dim]  # largest variance first
    # An eigenvector's sign is arbitrary: its largest entry is made positive.
    basis_ED = basis_ED * basis_ED.gather(0, basis_ED.abs().argmax(dim=0, keepdim=True)).sign()
    # Rank 0's, should another rank's processor round differently.
    basis_ED = group.all_reduce_sum(basis_ED if group.is_main else torch.zeros_like(basis_ED))
    return (rows_NE - mean_E.to(rows_NE.dtype)) @ basis_ED.to(rows_NE.dtype)
