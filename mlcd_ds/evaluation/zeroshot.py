"""Zero-shot classification: an image is of the class whose texts it is nearest to, as in CLIP (Radford et al. 2021).

A class is the mean of its texts' unit embeddings, at unit length: w_c = unit(mean_t unit(text(template_t(c)))). An
image x is taken for argmax_c <unit(x), w_c>. Equal similarities stand in the order of the classes, as argmax has it; a
class's place is the number of classes before it, and it is among the top k where that is below k. So top-1 is argmax's
answer also where similarities are equal (torch.topk promises no order there).

Shapes: n images on this rank, N on all; C classes, T texts of a class, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mlcd_ds.evaluation.accuracy import confusion_matrix, per_class_accuracy
from mlcd_ds.evaluation.prompts import filled
from mlcd_ds.evaluation.ranks import ALONE, Ranks

EncodeTexts = Callable[[list[str]], Tensor]
_TEXTS_A_BATCH = 256
_SIMILARITIES_A_BLOCK = 2**24  # 64 MiB


def class_embeddings(
    encode_texts: EncodeTexts,
    names: Sequence[str],
    templates: Sequence[str],
    ranks: Ranks = ALONE,
    texts_a_batch: int = _TEXTS_A_BATCH,
) -> Tensor:
    """Unit embeddings fp32 [C, E] of the classes on every rank; the names are dealt over `ranks`. Two all-gathers.

    `encode_texts` gives embeddings [B, E], of any length. It is called with whole classes, one at least.
    """
    own = ranks.share(len(names))
    if own.start == own.stop:  # more ranks than classes: of this rank's answer only the width is taken
        return ranks.concat(_embed(encode_texts, names[:1], templates)[:0])
    step = max(1, texts_a_batch // len(templates))
    parts = [names[start : min(start + step, own.stop)] for start in range(own.start, own.stop, step)]
    return ranks.concat(torch.cat([_embed(encode_texts, part, templates) for part in parts]))


def _embed(encode_texts: EncodeTexts, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    texts = [filled(template, name) for name in names for template in templates]
    emb_CTE = F.normalize(encode_texts(texts).float(), dim=1).view(len(names), len(templates), -1)
    return F.normalize(emb_CTE.mean(1), dim=1)


@dataclass(frozen=True, eq=False)
class ZeroShotHits:
    """Of each image: the class it is taken for, the place of its own class, and how much nearer the nearest of the
    other classes is than its own (negative where it is a hit)."""

    predictions_N: Tensor
    places_N: Tensor
    margins_N: Tensor

    def num_hits(self, k: int) -> int:
        """Images whose own class is among the k nearest."""
        return int((self.places_N < k).sum())


def zeroshot_hits(images_nE: Tensor, labels_n: Tensor, classes_CE: Tensor, ranks: Ranks = ALONE) -> ZeroShotHits:
    """Compare images (embeddings of any length) with unit embeddings of classes; of all ranks' images, in rank order.

    Raises ValueError for labels that are not in [0, C), and for embeddings that are not finite. Collectives:
    all-gathers of [N].
    """
    if len(labels_n) and not 0 <= int(labels_n.min()) <= int(labels_n.max()) < len(classes_CE):
        raise ValueError(f"labels must be in [0, {len(classes_CE)}), the number of classes")
    if not (images_nE.isfinite().all() and classes_CE.isfinite().all()):
        raise ValueError("embeddings of NaN or infinity")  # which would be before no other, and so a hit
    images_nE = F.normalize(images_nE.float(), dim=1)
    order_C = torch.arange(len(classes_CE), device=images_nE.device)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    block = max(1, _SIMILARITIES_A_BLOCK // len(classes_CE))
    for rows_bE, labels_b1 in zip(images_nE.split(block), labels_n.long()[:, None].split(block), strict=True):
        similarity_bC = rows_bE @ classes_CE.T
        own_b1 = similarity_bC.gather(1, labels_b1)
        is_before_bC = (similarity_bC > own_b1) | ((similarity_bC == own_b1) & (order_C < labels_b1))
        others_bC = similarity_bC.scatter(1, labels_b1, -torch.inf)
        found.append((similarity_bC.argmax(1), is_before_bC.sum(1), others_bC.amax(1) - own_b1[:, 0]))
    predictions_N, places_N, margins_N = (ranks.concat(torch.cat(parts)) for parts in zip(*found, strict=True))
    return ZeroShotHits(predictions_N, places_N, margins_N)


@dataclass(frozen=True, eq=False)
class ZeroShotResult:
    """What the hits amount to. Top-5 is None for fewer than five classes; the mean is over classes with an image."""

    num_images: int
    num_hits1: int
    num_hits5: int | None
    confusion_CC: Tensor  # counts; row true, column predicted

    def report(self) -> dict[str, float | int | None]:
        """Entries of report.json. `chance` is of guessing, `largest_class` of always naming the most frequent class."""
        of_class_C = self.confusion_CC.sum(1)
        return {
            "acc1": self.num_hits1 / self.num_images,
            "acc5": None if self.num_hits5 is None else self.num_hits5 / self.num_images,
            "mean_per_class_recall": float(per_class_accuracy(self.confusion_CC).nanmean()),
            "chance": 1 / len(of_class_C),
            "largest_class": int(of_class_C.max()) / self.num_images,
            "num_images": self.num_images,
            "num_hits1": self.num_hits1,
            "num_hits5": self.num_hits5,
        }


def zeroshot_result(hits: ZeroShotHits, labels_N: Tensor, num_classes: int) -> ZeroShotResult:
    """Count the hits of images with these labels."""
    confusion_CC = confusion_matrix(hits.predictions_N, labels_N, num_classes).cpu()
    hits5 = hits.num_hits(5) if num_classes >= 5 else None
    return ZeroShotResult(len(labels_N), hits.num_hits(1), hits5, confusion_CC)
