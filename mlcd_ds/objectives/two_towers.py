"""What objectives over images and their texts share: two towers, which meet in one space."""

from __future__ import annotations

from mlcd_ds.objectives.base import Objective
from mlcd_ds.recipes.sections import Sections


class TwoTowers(Objective):
    """An objective that takes the embeddings of an image tower and a text tower."""

    sections = ("text", "towers")
    towers = ("image", "text")
    fields = ("tokens",)

    @classmethod
    def check(cls, recipe: Sections) -> None:
        if recipe.text is None:
            raise ValueError(f"{recipe.objective.name} needs a text tower: add text: {{width: ..., depth: ..., ...}}")
        if recipe.text.embed_dim != recipe.model.embed_dim:
            raise ValueError(
                f"text.embed_dim {recipe.text.embed_dim} is not model.embed_dim {recipe.model.embed_dim}: the towers "
                "meet in one space, so change one of them"
            )
        frozen = [name for name in cls.towers if recipe.is_frozen(name)]
        if len(frozen) == len(cls.towers):
            raise ValueError("towers.image and towers.text are both frozen, and nothing is left to train: train one")
        if frozen and not recipe.train.init_from:
            raise ValueError(
                f"towers.{frozen[0]} is frozen, but train.init_from does not say where its weights come from: add "
                "--init-from FOLDER"
            )
        if "image" in frozen and recipe.train.knn_every:
            raise ValueError("train.knn_every is given, but towers.image is frozen: its accuracy would not change")
