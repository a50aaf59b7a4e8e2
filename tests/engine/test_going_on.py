"""Runs that go on in other ways: with more steps, or as the start of another run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distributed_harness import TinyData, quiet_environment
from safetensors.torch import load_file
from training_runs import DS_CONFIG, Training, assert_same_end, checkpoints, final_weights, start, write_recipe

pytestmark = pytest.mark.pipeline
CONSTANT = ("optimizer.schedule=constant", "head.sample_rate=0.5")


@pytest.fixture(scope="module")
def recipe(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("going-on") / "tiny.yaml", tiny_data.index, tiny_data.labels)


def run(recipe: Path, name: str, *overrides: str, ranks: int = 1, ds_config: Path = DS_CONFIG) -> Training:
    launcher = ("python", 1) if ranks == 1 else ("torchrun", ranks)
    out = recipe.parent / name
    training = start(recipe, out, *overrides, run=launcher, env=quiet_environment(), ds_config=ds_config)
    assert training.wait() == 0, training.text
    return training


@pytest.fixture(scope="module")
def lengthened(recipe: Path) -> Training:
    """A run that was finished at step 6, and went on to step 12 with other buckets."""
    run(recipe, "lengthened", *CONSTANT, "train.steps=6")
    other, content = recipe.parent / "other.json", json.loads(DS_CONFIG.read_text())
    content["zero_optimization"]["reduce_bucket_size"] = 1000
    other.write_text(json.dumps(content))
    return run(recipe, "lengthened", *CONSTANT, "train.steps=12", ds_config=other)


def test_a_finished_run_with_more_steps_ends_as_the_longer_run(recipe: Path, lengthened: Training) -> None:
    assert "train: 6 steps were done; going on to 12" in lengthened.text
    longer = run(recipe, "longer", *CONSTANT, "train.steps=12")
    assert_same_end(lengthened.out, longer.out)


def test_the_deepspeed_file_is_kept_and_a_changed_one_is_told(recipe: Path, lengthened: Training) -> None:
    told = [line for line in lengthened.text.splitlines() if "DeepSpeed" in line]
    path = lengthened.out / "deepspeed.json"
    assert told == [f"train: the DeepSpeed file differs from {path}: zero_optimization.reduce_bucket_size"]
    assert json.loads(path.read_text()) == json.loads((recipe.parent / "other.json").read_text())
    first, *_, last = (json.loads((folder / "checkpoint.json").read_text()) for folder in checkpoints(lengthened.out))
    assert (first["step"], last["step"]) == (6, 12)
    assert first["deepspeed"]["zero_optimization"]["reduce_bucket_size"] != 1000
    assert last["deepspeed"]["zero_optimization"]["reduce_bucket_size"] == 1000
    assert last["deepspeed"]["train_batch_size"] == 24, "as the engine was given it"


def test_a_run_starts_from_another_with_its_head(recipe: Path, lengthened: Training) -> None:
    """At another resolution and on two ranks; nothing moves at this rate."""
    overrides = ("--init-from", str(lengthened.out), "model.image_size=48", "train.steps=1", "optimizer.lr=1e-12")
    overrides = (*overrides, "optimizer.warmup_steps=0", "head.sample_rate=1", "optimizer.schedule=constant")
    training = run(recipe, "larger", *overrides, ranks=2)
    newest = checkpoints(lengthened.out)[-1]
    told = f"train: starts from {newest}; the backbone; positions resized from 32 to 48 px; the head's 25 centres"
    assert told in training.text.splitlines()
    before, after = final_weights(lengthened.out), final_weights(training.out)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        if name.startswith("head.exp_avg"):
            continue
        if "position_embedding" in name:
            assert after[name].shape[0] == 10 and torch.equal(after[name][0], weight[0])
        else:
            assert torch.allclose(after[name], weight, atol=1e-7), name
    parts = sorted(checkpoints(training.out)[-1].glob("head-*.safetensors"))
    assert len(parts) == 2
    steps = torch.cat([load_file(part)["step"] for part in parts])
    assert steps.unique().tolist() == [1], "the optimizer's state is new"
