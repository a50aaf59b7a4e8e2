"""Accuracies on a small labelled index while a model trains: by nearest neighbours, and by the names of the classes.

They draw none of the training's random numbers. N labelled images, D width, E embedding, C classes.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mlcd_ds.config import Recipe
from mlcd_ds.data.fields import TrainingData
from mlcd_ds.data.tokenizers import Tokenizer
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.engine.labelled_images import LabelledImages
from mlcd_ds.engine.layout import Layout
from mlcd_ds.errors import UserError
from mlcd_ds.evaluation.knn import weighted_knn
from mlcd_ds.evaluation.prompts import read_names, read_templates
from mlcd_ds.evaluation.zeroshot import class_embeddings, zeroshot_hits
from mlcd_ds.objectives.base import Embed

K = 20


class Monitor(Protocol):
    """An accuracy of the model as it is now."""

    def accuracy(self) -> float:
        """On every rank; NaN where the model gives none. Collective."""


class KnnMonitor:
    """The images are cut into two fixed halves, drawn with seed 0: one is classified by its neighbours in the other.
    Features are those that `mlcd evaluate` takes, before the projection."""

    def __init__(self, images: LabelledImages, embed: Embed) -> None:
        self._images, self._embed = images, embed

    def accuracy(self) -> float:
        """Top-1 by K neighbours (fewer where there are fewer), on every rank; NaN for features that are not finite.
        Collective."""
        features_ND = self._images.features(lambda images: self._embed("image", images, is_projected=False))
        if not features_ND.isfinite().all():
            return float("nan")
        _, labels_N = self._images.labels_N.unique(return_inverse=True)
        num_images, num_classes = len(labels_N), int(labels_N.max()) + 1
        order = torch.randperm(num_images, generator=torch.Generator().manual_seed(0)).to(labels_N.device)
        known, asked = order[: num_images // 2], order[num_images // 2 :]
        k = min(K, len(known))
        found = weighted_knn(
            features_ND[known], labels_N[known], features_ND[asked], labels_N[asked], num_classes, (k,)
        )
        return found[k]


class ZeroShotMonitor:
    """An image is of the class whose texts it is nearest to: data.classes in data.templates, as in `mlcd evaluate`."""

    def __init__(
        self, recipe: Recipe, images: LabelledImages, tokenizer: Tokenizer, embed: Embed, device: torch.device
    ) -> None:
        assert recipe.text and recipe.data.classes, "the recipe was checked"
        self._images, self._embed, self._tokenizer, self._device = images, embed, tokenizer, device
        self._context = recipe.text.context
        self._names, self._templates = read_names(recipe.data.classes), read_templates(recipe.data.templates)
        if (most := int(images.labels_N.max())) >= len(self._names):
            raise UserError(
                f"data.classes {recipe.data.classes} has {len(self._names)} names, but data.knn_index "
                f"{images.index.folder} has label {most}: name the file of these labels."
            )

    def embeddings(self) -> tuple[Tensor, Tensor]:
        """Of the images [N, E] and, at unit length, of the classes [C, E], on every rank. Collective."""
        images_NE = self._images.features(lambda images: self._embed("image", images, is_projected=True))
        # Each rank embeds all texts: under ZeRO 3 all ranks have to make the same calls.
        return images_NE, class_embeddings(self._encode, self._names, self._templates)

    def accuracy(self) -> float:
        """Top-1 on every rank; NaN for embeddings that are not finite. Collective."""
        images_NE, classes_CE = self.embeddings()
        if not (images_NE.isfinite().all() and classes_CE.isfinite().all()):
            return float("nan")
        hits = zeroshot_hits(images_NE, self._images.labels_N, classes_CE)
        return hits.num_hits(1) / len(self._images.labels_N)

    def _encode(self, texts: list[str]) -> Tensor:
        tokens_BL = torch.from_numpy(self._tokenizer.encode(texts, self._context)).to(self._device)
        return self._embed("text", tokens_BL, is_projected=True)


def build_monitors(
    recipe: Recipe,
    data: TrainingData,
    embed: Embed,
    batch_size: int,
    layout: Layout,
    group: Group,
    device: torch.device,
) -> dict[str, tuple[int, Monitor]]:
    """By name, what the recipe asks for, and every how many steps."""
    train = recipe.train
    if not (train.knn_every or train.zeroshot_every):
        return {}
    images = LabelledImages(recipe, batch_size, layout, group, device)
    monitors: dict[str, tuple[int, Monitor]] = {}
    if train.knn_every:
        monitors["knn"] = train.knn_every, KnnMonitor(images, embed)
    if train.zeroshot_every:
        assert data.tokenizer, "the recipe was checked"
        monitors["zeroshot"] = train.zeroshot_every, ZeroShotMonitor(recipe, images, data.tokenizer, embed, device)
    return monitors
