"""CLIP's linear probe, on features before the projection: its L2 swept on validation parts of the training set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mlcd_ds.artefacts.html_page import Section, captioned
from mlcd_ds.errors import UserError
from mlcd_ds.evaluation.class_page import answers, class_sections, spread, under
from mlcd_ds.evaluation.linear_probe import ProbeResult, linear_probe
from mlcd_ds.evaluation.ranks import Ranks
from mlcd_ds.stages.protocols.base import Outcome
from mlcd_ds.stages.protocols.labelled import Labelled


def check(train: Labelled) -> None:
    """UserError where there is nothing to validate on."""
    if int(np.bincount(train.rows.all("labels")).max()) < 2:
        raise UserError(f"{train.folder}: no class has two labelled images, one to validate on. Label more.")


def measure(train: Labelled, test: Labelled, names: Sequence[str], seed: int, num_splits: int, ranks: Ranks) -> Outcome:
    """Mean over the validation splits, with its standard error; `names` of all classes of the training images."""
    from mlcd_ds.evaluation.plots import confusion_plot

    own = train.features_nD, train.labels_n, test.features_nD, test.labels_n
    generator = torch.Generator().manual_seed(seed)
    probe = linear_probe(*own, len(names), generator, num_splits, ranks=ranks)
    told = f"linear probe {probe.accuracy:.1%} +- {probe.accuracy_se:.1%} ({num_splits} validation splits)"
    if probe.num_unconverged:
        told += f", of unfinished fits: {probe.num_unconverged} of {probe.num_fits} did not converge"
    return Outcome(
        report={
            "linear_probe": probe.accuracy,
            "linear_probe_se": probe.accuracy_se,
            "linear_probe_test_se": probe.test_se,
            "linear_probe_split_sd": probe.split_sd,
            "linear_probe_mean_per_class": probe.mean_per_class,
            "linear_probe_by_split": [{"l2": split.l2, "accuracy": split.accuracy} for split in probe.splits],
            "converged": probe.num_unconverged == 0,
        },
        told=told,
        task="linear_probe",
        metrics={"lp_acc1": probe.accuracy, "lp_mean_per_class_recall": probe.mean_per_class},
        sections=lambda: _sections(probe, test, names),
        files={"confusion.png": lambda file: confusion_plot(probe, names, file)},
    )


def _sections(probe: ProbeResult, test: Labelled, names: Sequence[str]) -> list[Section]:
    labels_M = torch.from_numpy(test.rows.all("labels"))
    num_right_M = (probe.predictions_SM == labels_M).sum(0)
    sections = class_sections(probe.confusion_CC, names, len(probe.splits))
    for heading, is_shown_M in (("Hits", num_right_M == len(probe.splits)), ("Misses", num_right_M == 0)):
        numbers = spread(is_shown_M)
        texts = answers(labels_M[numbers].tolist(), probe.predictions_SM[0, numbers].tolist(), names)
        sections.append((f"{heading} of all splits", captioned(test.rows.thumbnails(numbers), texts)))
    return under("Linear probe", sections)
