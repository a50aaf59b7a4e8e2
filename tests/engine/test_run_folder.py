"""Whose a run's folder is: what may change when the run goes on, when it is finished, and what is kept in it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from mlcd_ds.artefacts.files import write_json
from mlcd_ds.artefacts.manifest import MANIFEST_NAME
from mlcd_ds.config import Recipe, load_recipe
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.engine.run_folder import claim_folder, write_train_manifest
from mlcd_ds.engine.weights import CHECKPOINT_NAME, CheckpointManifest, read_run_recipe
from mlcd_ds.errors import UserError

INPUTS = {"index": "a", "labels": "b", "clusters": "c"}
DS_FILE = {"train_batch_size": "auto", "zero_optimization": {"stage": 1, "overlap_comm": True}}


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Group(dist.group.WORLD)
    dist.destroy_process_group()


def make_recipe(out: Path, steps: int, *overrides: str) -> Recipe:
    return load_recipe("demo", (f"train.out={out}", f"train.steps={steps}", "optimizer.warmup_steps=10", *overrides))


def add_checkpoint(recipe: Recipe, step: int) -> None:
    """What `claim_folder` looks at, without weights."""
    manifest = CheckpointManifest(
        step=step,
        num_ranks=1,
        zero_stage=1,
        inputs=INPUTS,
        recipe=recipe.model_dump(mode="json"),
        files={},
        versions={},
        git_commit=None,
    )
    folder = recipe.train.out / f"checkpoints/step_{step:08d}"
    write_json(folder / CHECKPOINT_NAME, manifest.model_dump(mode="json"))


CONSTANT, COOLED = ("optimizer.schedule=constant",), ("optimizer.schedule=constant", "optimizer.cooldown_steps=20")
# Ten episodes of ten steps; in the last two the image tower stays as it is.
EPISODES = (
    *("optimizer.schedule=constant", "objective={name: protoclip, episode_samples: 1280, num_clusters: 8}", "head={}"),
    "text={vocab_size: 300, end_token: 1, width: 16, depth: 1, heads: 2, mlp_width: 32, embed_dim: 128}",
)
COSINE_SAYS = (
    r"train.steps cannot change after \d+ steps: optimizer.schedule cosine spreads .*--init-from \S+ train.out="
)
COOLED_SAYS = r"cannot change after \d+ steps: the cool-down began after step 80. Remove the checkpoints after"


@pytest.mark.parametrize(
    ("before", "done", "steps", "now", "message"),
    [
        (CONSTANT, 100, 200, CONSTANT, None),
        (CONSTANT, 60, 200, CONSTANT, None),
        (CONSTANT, 60, 70, CONSTANT, None),
        (CONSTANT, 60, 60, CONSTANT, None),
        (CONSTANT, 60, 50, CONSTANT, "60 steps done: train.steps cannot be 50"),
        (COOLED, 80, 200, COOLED, None),
        (COOLED, 81, 200, COOLED, COOLED_SAYS),
        (COOLED, 100, 200, COOLED, COOLED_SAYS),
        (COOLED, 81, 90, COOLED, "cool-down began after step 70"),
        (CONSTANT, 100, 120, COOLED, None),
        (CONSTANT, 100, 100, COOLED, "optimizer.cooldown_steps cannot change after 100 steps: the cool-down began"),
        (EPISODES, 80, 200, EPISODES, None),
        (
            EPISODES,
            81,
            200,
            EPISODES,
            "train.steps cannot .* by it the objective protoclip would .* in step 80. Keep it",
        ),
        (EPISODES, 80, 90, EPISODES, "would have done something else in step 70"),
        (EPISODES, 70, 90, EPISODES, None),
        ((), 100, 200, (), COSINE_SAYS),
        ((), 60, 200, (), COSINE_SAYS),
        ((), 10, 200, (), None),
        ((), None, 200, (), None),
        ((), 100, 200, CONSTANT, "of a run with another optimizer.schedule: choose another train.out"),
        (CONSTANT, 60, 200, (*CONSTANT, "train.seed=5", "train.log_every=3"), r"of a run with another train.seed: "),
    ],
)
def test_steps_may_change_where_those_done_would_have_been_the_same(
    tmp_path: Path,
    group: Group,
    before: tuple[str, ...],
    done: int | None,
    steps: int,
    now: tuple[str, ...],
    message: str | None,
) -> None:
    first = make_recipe(tmp_path, 100, *before)
    assert not claim_folder(first, DS_FILE, INPUTS, group)
    if done:
        add_checkpoint(first, done)
    if message is None:
        assert not claim_folder(make_recipe(tmp_path, steps, *now), DS_FILE, INPUTS, group)
        assert read_run_recipe(tmp_path).train.steps == steps
    else:
        with pytest.raises(UserError, match=message):
            claim_folder(make_recipe(tmp_path, steps, *now), DS_FILE, INPUTS, group)
        assert read_run_recipe(tmp_path) == first, "a refused run leaves the folder as it was"


def finished(out: Path, group: Group) -> Recipe:
    recipe = make_recipe(out, 100, *CONSTANT)
    claim_folder(recipe, DS_FILE, INPUTS, group)
    add_checkpoint(recipe, 100)
    write_train_manifest(recipe, INPUTS)
    return recipe


def test_a_finished_run_is_done_until_it_is_given_more_steps(
    tmp_path: Path, group: Group, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="mlcd_ds")
    recipe = finished(tmp_path, group)
    assert claim_folder(recipe, DS_FILE, INPUTS, group)
    assert claim_folder(make_recipe(tmp_path, 100, *CONSTANT, "train.log_every=7"), DS_FILE, INPUTS, group)
    assert not caplog.records
    assert not claim_folder(make_recipe(tmp_path, 200, *CONSTANT), DS_FILE, INPUTS, group)
    assert caplog.messages == ["train: 100 steps were done; going on to 200"]
    assert not (tmp_path / MANIFEST_NAME).exists(), "the longer run is not finished"


def test_a_finished_run_of_other_inputs_stays_as_it_was(tmp_path: Path, group: Group) -> None:
    recipe = finished(tmp_path, group)
    with pytest.raises(UserError, match=r"was trained on other labels than data.labels names now"):
        claim_folder(recipe, DS_FILE, INPUTS | {"labels": "z"}, group)
    assert claim_folder(recipe, DS_FILE, INPUTS, group)


def test_a_finished_run_without_its_checkpoint_is_not_done(tmp_path: Path, group: Group) -> None:
    recipe = finished(tmp_path, group)
    (tmp_path / "checkpoints/step_00000100" / CHECKPOINT_NAME).unlink()
    with pytest.raises(UserError, match=rf"{CHECKPOINT_NAME} is missing\. .*remove .*{MANIFEST_NAME}"):
        claim_folder(recipe, DS_FILE, INPUTS, group)


def test_another_deepspeed_file_is_told_in_one_line(
    tmp_path: Path, group: Group, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="mlcd_ds")
    recipe = make_recipe(tmp_path, 100)
    for _ in range(2):
        claim_folder(recipe, DS_FILE, INPUTS, group)
    assert not caplog.records
    other = {"zero_optimization": {"stage": 2, "overlap_comm": True}, "bf16": {"enabled": "auto"}}
    claim_folder(recipe, other, INPUTS, group)
    keys = "train_batch_size, zero_optimization.stage, bf16.enabled"
    assert caplog.messages == [f"train: the DeepSpeed file differs from {tmp_path}/deepspeed.json: {keys}"]
    assert json.loads((tmp_path / "deepspeed.json").read_text()) == other
    (tmp_path / "deepspeed.json").write_text("{")
    with pytest.raises(UserError, match=r"deepspeed.json cannot be read: .*Remove it"):
        claim_folder(recipe, other, INPUTS, group)


def test_a_run_without_a_checkpoint_takes_another_recipe(tmp_path: Path, group: Group) -> None:
    """A wrong train.init_from, found when the folder was claimed, can be corrected there."""
    claim_folder(make_recipe(tmp_path, 100, "train.init_from=wrong"), DS_FILE, INPUTS, group)
    claim_folder(make_recipe(tmp_path, 100, "train.init_from=right"), DS_FILE, INPUTS, group)
    assert "right" in (tmp_path / "config.yaml").read_text()
