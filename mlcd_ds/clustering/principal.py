"""Principal components of rows of all ranks.

N rows of this rank, E width, D components.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlcd_ds.distributed.collectives import Group

BLOCK_ROWS = 8192


def principal_components(rows_NE: Tensor, num_rows: int, dim: int, group: Group) -> Tensor:
    """fp32 [N, D]: each row's coordinates along the `dim` directions in which the `num_rows` rows of all ranks vary
    most, about their mean. Collectives: all-reduces of [E] and [E, E] fp64, an all-gather of [E, D]."""
    mean_E = group.all_reduce_sum(rows_NE.sum(dim=0, dtype=torch.float64)) / num_rows
    covariance_EE = torch.zeros(rows_NE.shape[1], rows_NE.shape[1], dtype=torch.float64, device=rows_NE.device)
    for block_BE in rows_NE.split(BLOCK_ROWS):
        centred_BE = block_BE - mean_E.to(block_BE.dtype)
        covariance_EE += (centred_BE.T @ centred_BE).double()
    group.all_reduce_sum(covariance_EE)
    basis_ED = torch.linalg.eigh(covariance_EE).eigenvectors[:, -dim:].flip(1).contiguous()
    # Rank 0's, should another rank's processor round differently: a direction's sign is arbitrary.
    basis_ED = group.all_gather(basis_ED)[: len(basis_ED)].float()
    return (rows_NE - mean_E.to(rows_NE.dtype)) @ basis_ED
