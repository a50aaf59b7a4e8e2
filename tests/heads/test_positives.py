"""The labels' own products against autograd in float64, with their pairs in several blocks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from distributed_harness import assert_close, assert_differs
from torch import Tensor

from mlcd_ds.heads import positives
from mlcd_ds.heads.centers import Centers
from mlcd_ds.heads.class_shards import ClassRange
from mlcd_ds.heads.positives import Positives

NUM_IMAGES, NUM_LABELS, DIM = 13, 3, 6
CLASSES = ClassRange(4, 15, 20)


class FirstBlockOnly(Positives):
    def _blocks(self) -> Iterator[slice]:
        yield next(super()._blocks())


def products(kind: type[Positives], is_compact: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """What `kind` computes, beside what autograd does."""
    generator = torch.Generator().manual_seed(0)
    emb_GE, weight_LE, slopes_GP = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((NUM_IMAGES, DIM), (len(CLASSES), DIM), (NUM_IMAGES, NUM_LABELS))
    )
    labels_GP = torch.randint(-1, CLASSES.num_classes, (NUM_IMAGES, NUM_LABELS), generator=generator)
    found = Positives.find(labels_GP, CLASSES, is_compact=is_compact)
    found = kind(found.places_K, found.rows_K, found.is_here_K, found.num_labels)
    centers = Centers(weight_LE, torch.zeros_like(weight_LE))
    cosines_GP, grad_GE = found.cosines(emb_GE, centers), torch.zeros_like(emb_GE)
    found.add_emb_gradients(centers, slopes_GP, grad_GE)
    found.add_row_gradients(emb_GE, centers, slopes_GP)

    emb_GE, weight_LE = emb_GE.clone().requires_grad_(), weight_LE.clone().requires_grad_()
    is_here_GP = (labels_GP >= CLASSES.begin) & (labels_GP < CLASSES.end)
    rows_GPE = F.normalize(weight_LE, dim=1)[(labels_GP - CLASSES.begin) * is_here_GP]
    expected_GP = (emb_GE[:, None] * rows_GPE).sum(2) * is_here_GP
    expected_GP.backward(slopes_GP)
    return {
        "cosines": (cosines_GP, expected_GP.detach()),
        "embeddings": (grad_GE, emb_GE.grad),
        "rows": (centers.grad_LE, weight_LE.grad),
    }


@pytest.mark.parametrize("is_compact", [True, False])
def test_pairs_in_several_blocks(is_compact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(positives.BLOCK_PAIRS, "cpu", 5)
    for name, (ours, expected) in products(Positives, is_compact).items():
        assert_close(name, ours, expected, 1e-13)
    for name, (ours, expected) in products(FirstBlockOnly, is_compact).items():
        assert_differs(name, ours, expected, 1e-13)
