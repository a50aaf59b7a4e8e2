"""How much memory the head takes on a rank, from its shapes alone."""

from __future__ import annotations

from mlcd_ds.heads.negatives import BLOCKS
from mlcd_ds.heads.positives import BLOCK_PAIRS
from mlcd_ds.heads.row_optimizer import BLOCK_ROWS

FP32, BF16, INT64 = 4, 2, 8


def head_memory(
    num_ranks: int,
    num_classes: int,
    dim: int,
    global_batch: int,
    num_labels: int,
    *,
    num_moments: int = 2,
    num_samples: int = 1,
) -> dict[str, int]:
    """Bytes on one of `num_ranks` GPUs that share the classes, with bf16 products.

    `state` stays for the whole run: centres, their gradient, moments, and a row's step, mark and slot. The others are
    there during a step, and none depends on the sample rate; `rows` (the optimizer's block) comes after the rest.
    `num_samples`: 1, or that of labels with a sample of their own, of which one adds to the others' gradient.
    """
    rows = -(-num_classes // num_ranks)
    images, classes = min(BLOCKS["cuda"].images, global_batch), min(BLOCKS["cuda"].classes, rows)
    return {
        "state": rows * (dim * FP32 * (2 + num_moments) + 4 + 1 + INT64),
        "embeddings": global_batch * dim * BF16,
        "embedding gradient": global_batch * dim * FP32 * min(2, num_samples),
        # Labels, their slots and places, cosines and slopes.
        "labels": global_batch * num_labels * (3 * INT64 + 3 * FP32),
        # The logits' exponentials in fp32 and bf16, their product with the centres, and the centres with a gradient.
        "block": images * (classes * (FP32 + BF16) + dim * FP32) + classes * dim * 4 * FP32,
        # Five tensors of a block of labels' centres; six of a block of rows.
        "pairs": 5 * min(BLOCK_PAIRS["cuda"], global_batch * num_labels) * dim * FP32,
        "rows": 6 * min(BLOCK_ROWS["cuda"], rows) * dim * FP32,
    }


def stored_logits(num_ranks: int, num_classes: int, rate: float, global_batch: int) -> int:
    """Bytes of one fp32 copy of the logits [G, S], which a head that keeps them holds several times."""
    return round(rate * num_classes / num_ranks) * global_batch * FP32
