"""Zero-shot classification of the test images by class names in templates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mlcd_ds.artefacts.html_page import Section, captioned
from mlcd_ds.encoders.base import TextEncoder
from mlcd_ds.errors import UserError
from mlcd_ds.evaluation.class_page import SHOWN, answers, class_sections, under
from mlcd_ds.evaluation.ranks import Ranks
from mlcd_ds.evaluation.zeroshot import ZeroShotHits, ZeroShotResult, class_embeddings, zeroshot_hits, zeroshot_result
from mlcd_ds.stages.protocols.base import Outcome
from mlcd_ds.stages.protocols.rows import UNLABELLED, Rows, refuse_not_finite, refuse_unlabelled

METRICS = ("acc1", "acc5", "mean_per_class_recall")


def check(images: Rows, names: Sequence[str], classes: Path, label_key: str) -> None:
    """UserError where names and labels do not fit together."""
    labels_N = images.all("labels")
    refuse_unlabelled(images, label_key)
    if labels_N.max() >= len(names):
        raise UserError(
            f"{images.index.folder} has label {labels_N.max()}, but --classes {classes} has {len(names)} names, of "
            f"labels 0 to {len(names) - 1}. Give the names of all labels, in their order."
        )


def measure(
    images: Rows,
    texts: TextEncoder,
    names: Sequence[str],
    templates: Sequence[str],
    ranks: Ranks,
    device: torch.device,
) -> Outcome:
    """Top-1, top-5 and the mean per class of the labelled images."""
    with torch.inference_mode():
        classes_CE = class_embeddings(texts.encode, names, templates, ranks)
    images_nE, labels_n = images.own("", ranks, device), images.own("labels", ranks, device)
    refuse_not_finite(classes_CE, ranks, f"{texts.name} gives embeddings of class names")
    refuse_not_finite(images_nE, ranks, f"{texts.name} gives embeddings of images")
    is_labelled = labels_n != UNLABELLED
    hits = zeroshot_hits(images_nE[is_labelled], labels_n[is_labelled], classes_CE, ranks)
    labels_N = images.all("labels")
    numbers_N = np.flatnonzero(labels_N != UNLABELLED)
    true_N = torch.from_numpy(labels_N[numbers_N])
    result = zeroshot_result(hits, true_N.to(device), len(names))
    report = result.report()
    return Outcome(
        report={"zeroshot": report},
        told=f"zero-shot {report['acc1']:.1%} of {result.num_images} images, {len(names)} classes",
        task="zeroshot_classification",
        metrics={name: report[name] for name in METRICS},
        sections=lambda: _sections(images, numbers_N, hits, true_N, result, names),
    )


def _sections(
    images: Rows,
    numbers_N: np.ndarray,
    hits: ZeroShotHits,
    true_N: torch.Tensor,
    result: ZeroShotResult,
    names: Sequence[str],
) -> list[Section]:
    sections = class_sections(result.confusion_CC, names)
    order = hits.margins_N.cpu().argsort(stable=True)
    is_hit = hits.places_N.cpu()[order] == 0
    taken_N = hits.predictions_N.cpu()
    for heading, shown in (("Surest hits", order[is_hit][:SHOWN]), ("Surest misses", order[~is_hit].flip(0)[:SHOWN])):
        texts = answers(true_N[shown].tolist(), taken_N[shown].tolist(), names)
        sections.append((heading, captioned(images.thumbnails(numbers_N[shown.numpy()].tolist()), texts)))
    return under("Zero-shot", sections)
