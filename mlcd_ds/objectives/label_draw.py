"""Some of an image's labels, drawn anew in each epoch. B images on this rank, P labels an image, p of them drawn."""

from __future__ import annotations

from torch import Tensor

from mlcd_ds.heads.partial_fc import without_repeats
from mlcd_ds.models.noise import uniforms

STREAM = 2  # of the images' noise; the model's are 0 and 1


def draw_labels(labels_BP: Tensor, keys_B: Tensor, count: int) -> Tensor:
    """[B, p]: `count` of an image's labels, in their order, by its noise key: the same on any number of ranks.

    A label mentioned again is none (-1), and none is drawn only where an image has fewer labels than `count`.
    """
    labels_BP = without_repeats(labels_BP)
    # Labels come before none: uniform numbers are below 1.
    draws_BP = uniforms(keys_B, STREAM, labels_BP.shape[1]).masked_fill(labels_BP < 0, 1.0)
    places_Bp = draws_BP.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values
    return labels_BP.gather(1, places_Bp)
