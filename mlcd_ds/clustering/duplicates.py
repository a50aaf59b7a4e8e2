"""Near-identical embeddings, found before clustering: web images are full of copies, which would draw centres.

Rows are bucketed by the signs of random projections (Charikar, 2002), in several tables; rows of a bucket are compared
with one another, in fp32. Two rows at an angle a share a table's bucket with probability (1 - a / pi)^bits.

N rows of this rank, B rows of a block, E width, T tables.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mlcd_ds.clustering.kmeans import BLOCK_ROWS, Rows
from mlcd_ds.clustering.row_sampling import uniforms
from mlcd_ds.distributed.collectives import Group

NUM_TABLES = 8
ROWS_A_BUCKET = 16  # expected, were rows spread evenly
MOST_COMPARED = 2048  # rows of a bucket that are compared with one another at once


class ReadableRows(Rows, Protocol):
    """Rows that a rank can read even where they belong to other ranks."""

    begin: int
    end: int

    def read(self, numbers_K: np.ndarray) -> Tensor:
        """fp32 [K, E]: any rows of all ranks."""


def find_duplicates(rows: ReadableRows, group: Group, threshold: float, seed: int) -> np.ndarray:
    """Global numbers int64, sorted, of all rows whose cosine to a row with a smaller number is at least `threshold`, as
    far as the two share a bucket.

    Of each group of copies the first stays. Collectives: an exchange of signatures and numbers for each table, 16 bytes
    a row; a gather of what was found.
    """
    numbers_N, signatures_NT = _signatures(rows, seed)
    found = [np.zeros(0, np.int64)]
    for table in range(NUM_TABLES):
        pairs_N2 = torch.stack([signatures_NT[:, table], numbers_N], dim=1)
        owner_N = torch.from_numpy((uniforms(signatures_NT[:, table].numpy(), seed) * group.size).astype(np.int64))
        received_M2 = group.exchange([pairs_N2[owner_N == rank] for rank in range(group.size)]).numpy()
        found.append(_copies_in_buckets(rows, received_M2, threshold))
    parts = group.gather_objects(np.unique(np.concatenate(found)))
    return np.unique(np.concatenate(parts))


def _signatures(rows: Rows, seed: int) -> tuple[Tensor, Tensor]:
    """Global numbers int64 [N], and signatures int64 [N, T]."""
    bits = max(4, min(62, int(np.ceil(np.log2(max(2, rows.num_rows / ROWS_A_BUCKET))))))
    noise = np.random.default_rng([seed, 1]).standard_normal((rows.dim, NUM_TABLES * bits), dtype=np.float32)
    weights = 2 ** torch.arange(bits)
    numbers, signatures = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, NUM_TABLES, dtype=torch.int64)]
    for numbers_B, rows_BE in rows.blocks(BLOCK_ROWS):
        signs = (rows_BE.float() @ torch.from_numpy(noise) > 0).view(len(rows_BE), NUM_TABLES, bits)
        numbers.append(numbers_B)
        signatures.append((signs * weights).sum(dim=2))
    return torch.cat(numbers), torch.cat(signatures)


def _copies_in_buckets(rows: ReadableRows, pairs_M2: np.ndarray, threshold: float) -> np.ndarray:
    """Numbers of the rows that follow a near copy in their bucket. `pairs_M2`: signature and number of each row."""
    pairs_M2 = pairs_M2[np.lexsort((pairs_M2[:, 1], pairs_M2[:, 0]))]
    borders = np.flatnonzero(np.diff(pairs_M2[:, 0], prepend=-1, append=-1))
    found = [np.zeros(0, np.int64)]
    for begin, end in pairwise(borders):
        left = pairs_M2[begin:end, 1]
        while len(left) > 1:
            some = left[:MOST_COMPARED]
            rows_KE = F.normalize(rows.read(some), dim=1)
            is_copy_K = ((rows_KE @ rows_KE.T).tril(-1) >= threshold).any(dim=1).numpy()
            found.append(some[is_copy_K])
            if len(left) <= MOST_COMPARED:
                break
            # The first of each group stays to be compared with what comes next, as long as there is room for new rows.
            left = np.concatenate([some[~is_copy_K][: MOST_COMPARED // 2], left[MOST_COMPARED:]])
    return np.concatenate(found)
