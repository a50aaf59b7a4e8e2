"""Recipes that build on another, and the keys that may change when a run goes on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlcd_ds.config import changed_keys, dump_recipe, free_keys, load_recipe
from mlcd_ds.errors import UserError


def write(path: Path, **content: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"description": path.stem, **content}))
    return str(path)


def test_what_a_recipe_says_stands_over_its_base(tmp_path: Path) -> None:
    write(tmp_path / "below/middle.yaml", base="vit_l_14", model={"image_size": 336}, train={"out": "runs/middle"})
    phases = [{"until": 10, "token_drop": 0.5}]
    top = write(
        tmp_path / "top.yaml",
        base="below/middle.yaml",
        optimizer={"lr": 5e-4, "warmup_steps": 10},
        train={"micro_batch_per_rank": None, "phases": phases},
    )
    expected = ["description", "model.image_size", "optimizer.lr", "optimizer.warmup_steps", "train.out"]
    expected += ["train.micro_batch_per_rank", "train.phases"]
    recipe = load_recipe(top)
    assert changed_keys(load_recipe("vit_l_14"), recipe) == expected
    assert recipe.description == "top" and recipe.train.micro_batch_per_rank is None
    assert load_recipe(top, ("model.image_size=224",)).model.image_size == 224, "the command line comes last"
    # A list replaces a list.
    again = load_recipe(write(tmp_path / "again.yaml", base="top.yaml", train={"phases": [{"until": 20}]}))
    assert [phase.until for phase in again.train.phases] == [20]


def test_another_objective_takes_over_neither_the_base_s_nor_its_head(tmp_path: Path) -> None:
    base = load_recipe("demo")
    assert base.head.init == "centers" and base.objective.name == "mlcd"
    text = {"width": 32, "depth": 1, "heads": 4, "mlp_width": 64, "embed_dim": base.model.embed_dim}
    recipe = load_recipe(write(tmp_path / "clip.yaml", base="demo", objective={"name": "clip"}, text=text))
    assert recipe.objective.model_dump() == {
        "name": "clip",
        "temperature": 0.07,
        "max_scale": 100.0,
        "precision": "auto",
    }
    assert recipe.head.init == "normal" and recipe.train == base.train
    again = load_recipe(write(tmp_path / "again.yaml", base="clip.yaml", objective={"temperature": 0.1}))
    assert again.objective.name == "clip" and again.objective.temperature == 0.1
    pairs = load_recipe(write(tmp_path / "siglip.yaml", base="clip.yaml", objective={"name": "siglip"}))
    assert pairs.objective.first_bias == -10.0 and pairs.text == recipe.text, "what is for both is taken over"
    same = load_recipe(write(tmp_path / "same.yaml", base="demo", objective={"name": "mlc"}))
    assert same.objective.name == "mlc" and same.objective.scale == 16.0 and same.head == base.head, "of the same kind"
    with pytest.raises(UserError, match=r"objective.scale belongs to mlcd, mlc, .* is clip"):
        load_recipe("demo", ("objective.name=clip",))


def test_the_resolved_recipe_is_whole(tmp_path: Path) -> None:
    recipe = load_recipe("vit_l_14_336")
    path = tmp_path / "elsewhere/config.yaml"
    path.parent.mkdir()
    path.write_text(dump_recipe(recipe))
    assert "base" not in yaml.safe_load(path.read_text()) and load_recipe(str(path)) == recipe


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"base": "nosuch"}, r"top.yaml: base 'nosuch': no such file, and not one of clip_vit_b_32, demo"),
        ({"base": "nosuch.yaml"}, r"top.yaml: base 'nosuch.yaml': no such file"),
        ({"base": ["vit_l_14"]}, r"top.yaml: base \['vit_l_14'\]: no such file"),
        ({"base": "top.yaml"}, r"top.yaml: base 'top.yaml' leads back to itself: \S*top.yaml -> \S*top.yaml\."),
        ({"base": "circle.yaml"}, r"circle.yaml: base '\./top.yaml' leads back .*top.* -> .*circle.* -> .*top.yaml\."),
        ({"base": "vit_l_14", "train": {"stepz": 3}}, r"top.yaml: train.stepz.*Did you mean steps"),
        ({"base": "misspelt.yaml"}, r"top.yaml: train.stepz.*Did you mean steps"),
        ({"base": "vit_l_14", "train": 3}, r"top.yaml: train"),
    ],
)
def test_what_cannot_be_built_on_is_named(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    write(tmp_path / "circle.yaml", base="./top.yaml")
    write(tmp_path / "misspelt.yaml", base="vit_l_14", train={"stepz": 3})
    with pytest.raises(UserError, match=message):
        load_recipe(write(tmp_path / "top.yaml", **content))


def test_a_description_is_not_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "top.yaml"
    path.write_text("base: vit_l_14\n")
    with pytest.raises(UserError, match=re.escape(f"{path}: description: Field required")):
        load_recipe(str(path))


def test_the_keys_that_may_change_when_a_run_goes_on() -> None:
    always = ["description", "data.index", "data.labels", "data.clusters", "data.num_threads", "head.parallel_size"]
    always += [f"train.{key}" for key in ("out", "micro_batch_per_rank", "recompute", "compile")]
    always += [f"train.{key}" for key in ("checkpoint_every", "keep_checkpoints", "log_every")]
    always += [f"train.{key}" for key in ("ema_decay", "knn_every", "milestone_every", "profile_steps")]
    always += [f"data.{key}" for key in ("knn_index", "knn_label_key", "classes", "templates", "tokenizer")]
    always += ["train.zeroshot_every"]
    with_rates = ["optimizer.cooldown_steps", "train.steps"]
    assert {key for key, when in free_keys().items() if when == "always"} == set(always)
    assert {key for key, when in free_keys().items() if when == "rates"} == set(with_rates)
