"""Checkpoints as evaluation and export read them: sound ones load, and every change to one is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from shard_maker import run_stage
from training_runs import tiny_recipe

from mlcd_ds.artefacts.files import record_of
from mlcd_ds.config import Recipe, dump_recipe, parse_recipe
from mlcd_ds.encoders.registry import load_encoder
from mlcd_ds.engine.released import load_released
from mlcd_ds.engine.run_log import entries_until
from mlcd_ds.engine.weights import (
    BACKBONE_NAME,
    CHECKPOINT_NAME,
    CONFIG_NAME,
    CheckpointManifest,
    load_backbone,
    missing_file,
    read_checkpoint,
    read_run_recipe,
    write_checkpoint_manifest,
)
from mlcd_ds.errors import UserError
from mlcd_ds.models.vit import ViT


def write_run(run: Path, recipe: Recipe, step: int = 8) -> Path:
    """A run's folder with one checkpoint, as far as evaluation and export look at it. Returns the checkpoint."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (run / CONFIG_NAME).write_text(dump_recipe(recipe))
    model = ViT(recipe.model)
    model.init_weights(torch.Generator().manual_seed(0))
    save_file(model.state_dict(), folder / BACKBONE_NAME)
    manifest = CheckpointManifest(
        step=step,
        num_ranks=1,
        zero_stage=1,
        num_updates=step,
        inputs={},
        recipe=recipe.model_dump(mode="json"),
        files={BACKBONE_NAME: record_of(folder / BACKBONE_NAME)},
        versions={},
        git_commit=None,
    )
    write_checkpoint_manifest(folder, manifest)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", parse_recipe(tiny_recipe(Path("index"), Path("labels")), "here"))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_changed_backbone_is_neither_exported_nor_evaluated(checkpoint: Path, tmp_path: Path) -> None:
    run, path = checkpoint.parents[1], checkpoint / BACKBONE_NAME
    assert run_stage("export", "--run", run, "--out", tmp_path / "sound").status == 0
    load_encoder(str(run))
    flip(path, -1000)
    with pytest.raises(UserError, match="checksum") as caught:
        load_encoder(str(run))
    assert str(path) in str(caught.value) and f"Remove {checkpoint}" in str(caught.value)
    done = run_stage("export", "--run", run, "--out", tmp_path / "out")
    assert done.status == 2 and str(caught.value) in done.err and "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "projection.safetensors"])
def test_a_changed_export_is_neither_evaluated_nor_started_from(checkpoint: Path, tmp_path: Path, name: str) -> None:
    export, model = tmp_path / "export", load_backbone(checkpoint)
    assert run_stage("export", "--run", checkpoint.parents[1], "--out", export).status == 0
    load_encoder(str(export))
    load_released(export, model)
    flip(export / name, -20)
    for read in (lambda: load_encoder(str(export)), lambda: load_released(export, model)):
        with pytest.raises(UserError, match=f"{name}: its checksum .* `mlcd export --overwrite"):
            read()


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(step=9),
        lambda content: content.update(num_updates=9),
        lambda content: content["recipe"]["model"].update(heads=4),
        lambda content: content.update(seal="0" * 64),
        lambda content: content["files"].clear(),
    ],
)
def test_a_changed_checkpoint_json_is_named(checkpoint: Path, change: Any) -> None:
    path = checkpoint / CHECKPOINT_NAME
    read_checkpoint(checkpoint)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        read_checkpoint(checkpoint)
    assert str(path) in str(caught.value) and f"Remove {checkpoint}" in str(caught.value)


def test_a_checkpoint_under_another_steps_name_is_named(checkpoint: Path) -> None:
    other = checkpoint.with_name("step_00000009")
    shutil.copytree(checkpoint, other)
    with pytest.raises(UserError, match="step_00000009"):
        read_checkpoint(other)


def test_files_that_are_gone_are_found(checkpoint: Path) -> None:
    manifest = read_checkpoint(checkpoint)
    assert missing_file(checkpoint, manifest) is None
    (checkpoint / BACKBONE_NAME).unlink()
    assert missing_file(checkpoint, manifest) == checkpoint / BACKBONE_NAME
    with pytest.raises(UserError, match=f"{BACKBONE_NAME} is missing"):
        load_backbone(checkpoint)


@pytest.mark.parametrize("content", [b"", b"model: [", b"\xff\xfe\x00", b"a: 1\na: 2", b"[1]", b"model: {width: 1}"])
def test_a_damaged_config_is_named(checkpoint: Path, content: bytes) -> None:
    run = checkpoint.parents[1]
    assert read_run_recipe(run).train.steps == 8
    (run / CONFIG_NAME).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_run_recipe(run)
    assert str(run / CONFIG_NAME) in str(caught.value)


def test_metrics_are_cut_to_a_step_and_damaged_lines_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1 / step}).encode() for step in (1, 2, 3)]
    path.write_bytes(b"\n".join(lines) + b'\n{"step": 4, "lo')  # as a kill leaves it
    assert entries_until(path, 2) == lines[:2] and entries_until(path, 9) == lines
    for damaged in (b"nonsense}", b"", b"{}", b"[1]", b'{"step": "2"}', b"\x00" * 9, b"[" * 100_000):
        path.write_bytes(b"\n".join([lines[0], damaged, lines[2]]) + b"\n")
        with pytest.raises(UserError, match=r"metrics\.jsonl line 2 .*Remove this line"):
            entries_until(path, 2)
