"""First values of the head's centres, the same on any number of ranks.

D embedding of the backbone, E width of the clustered embeddings, L classes on this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlcd_ds.clustering.principal import principal_components
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.heads.class_sampling import mixed_seed
from mlcd_ds.heads.class_shards import ClassRange

BLOCK = 4096  # classes that share a generator


def normal_centers(classes: ClassRange, dim: int, std: float, seed: int) -> Tensor:
    """[L, D] from N(0, std), a generator a block of classes."""
    rows_LD = torch.empty(len(classes), dim)
    for first in range(classes.begin // BLOCK * BLOCK, classes.end, BLOCK):
        generator = torch.Generator().manual_seed(mixed_seed(seed, -1, first))
        block = torch.randn(BLOCK, dim, generator=generator) * std
        begin, end = max(first, classes.begin), min(first + BLOCK, classes.end)
        rows_LD[begin - classes.begin : end - classes.begin] = block[begin - first : end - first]
    return rows_LD


def projected_centers(centers_LE: Tensor, num_classes: int, dim: int, std: float, group: Group) -> Tensor:
    """[L, D]: the k-means centres in their `dim` principal directions, each of length std * sqrt(dim).

    The student then starts with the teacher's geometry between the classes. Where E < D the rest is zero. Collectives:
    those of `principal_components`.
    """
    rows_LD = principal_components(centers_LE.double(), num_classes, dim, group)
    rows_LD = torch.nn.functional.normalize(rows_LD, dim=1) * std * dim**0.5
    return torch.nn.functional.pad(rows_LD, (0, dim - rows_LD.shape[1])).float()
