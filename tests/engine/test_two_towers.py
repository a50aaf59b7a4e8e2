"""CLIP, SigLIP and LiT in the whole trainer: any layout trains as one process."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_harness import TinyData, assert_close, assert_differs, run_ranks
from pair_trainers import assert_as_one_process, go_on, make_trainer, train_mlcd
from safetensors.torch import load_file, save_file
from torch import Tensor
from trainers import whole

from mlcd_ds.artefacts.files import record_of, write_json
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.engine.gradients import GradientFactors
from mlcd_ds.engine.layout import Layout
from mlcd_ds.engine.trainer import Trainer
from mlcd_ds.engine.weights import load_backbone, newest_checkpoint, read_checkpoint
from mlcd_ds.errors import UserError
from mlcd_ds.models.noise import TrainingNoise
from mlcd_ds.objectives.base import Given

NUM_STEPS = 4
GRID = tuple(("clip", stage, 3) for stage in range(4)) + tuple(("lit", stage, 3 - stage % 2 * 2) for stage in range(4))
# By ranks and tensor-parallel size: objective, ZeRO stage, micro-batches.
CASES = {
    (1, 1): (("clip", 0, 1), ("siglip", 0, 2), ("lit", 0, 1), *GRID, ("bf16", 1, 3), ("bf16", 0, 1)),
    (2, 1): (*GRID, ("clip", 1, 1), ("siglip", 2, 2)),
    (2, 2): GRID,
    (4, 1): GRID,
    (4, 2): (*GRID, ("siglip", 3, 2)),
}
FIRST = {name: (name, 0, count) for name, count in (("clip", 1), ("siglip", 2), ("lit", 1))}
BF16_TOLERANCE = 5e-2  # of losses, against fp32
# Measured over all stages of one, two and four ranks: losses 2.7e-7, norms 8e-7, weights 1.8e-5.
CURVE_TOLERANCE, WEIGHT_TOLERANCE = 3e-6, 1e-4


Found = dict[tuple[str, int, int], tuple[Tensor, dict[str, Tensor]]]


def train_all(group: Group, data: TinyData, folder: Path, tensor_parallel: int) -> Found:
    """The cases of so many ranks."""
    os.environ.update(RANK=str(group.rank), WORLD_SIZE=str(group.size), LOCAL_RANK=str(group.rank))
    found: dict[Any, Any] = {}
    train_mlcd(data, folder / "mlcd", group)
    for name, stage, micro_batches in CASES[group.size, tensor_parallel]:
        out, layout = folder / f"{name}-{stage}-{micro_batches}", Layout(group.size, tensor_parallel, stage)
        trainer = make_trainer(data, out, layout, group, name, micro_batches)
        curve = go_on(trainer, 0, NUM_STEPS)
        found[name, stage, micro_batches] = curve, whole(trainer)
        trainer.engine.destroy()
    return found


def resume_all(group: Group, data: TinyData, folder: Path) -> dict[str, Any]:
    """Saved after two steps under one ZeRO stage, gone on from under each: [expected, resumed]; and the files."""
    os.environ.update(RANK=str(group.rank), WORLD_SIZE=str(group.size), LOCAL_RANK=str(group.rank))
    found: dict[str, Any] = {}
    for stage in (1, 3):
        trainer = make_trainer(data, folder / str(stage), Layout(group.size, 1, stage), group, "clip", 3)
        go_on(trainer, 0, 2)
        path = trainer.checkpointer.save(2)
        found[f"expected {stage}"] = go_on(trainer, 2, NUM_STEPS), whole(trainer)
        found["files"] = sorted(file.name for file in path.iterdir())
        trainer.engine.destroy()
        for to_stage in (1, 3):
            trainer = make_trainer(data, folder / str(stage), Layout(group.size, 1, to_stage), group, "clip", 3)
            assert trainer.checkpointer.resume() == 2
            found[f"{stage} to {to_stage}"] = go_on(trainer, 2, NUM_STEPS), whole(trainer)
            trainer.engine.destroy()
    return found


def twins(group: Group, data: TinyData, folder: Path) -> dict[str, Tensor]:
    """Known-bad: three micro-batches by the factors of one; the scale's gradient for each of them; other noise."""
    os.environ.update(RANK=str(group.rank), WORLD_SIZE=str(group.size), LOCAL_RANK=str(group.rank))
    curves = {}
    shares, forward = Given.shares, Trainer._forward

    def unshared(given: Given, count: int) -> list[Given]:
        return [
            Given(g.loss, g.parts, {**g.gradients, "scale": given.gradients["scale"]}) for g in shares(given, count)
        ]

    def noisy(trainer: Trainer, inputs: dict[str, Tensor], noise: TrainingNoise) -> dict[str, Tensor]:
        return forward(trainer, inputs, noise if torch.is_grad_enabled() else replace(noise, keys_B=noise.keys_B + 1))

    for name, target, attribute, change in (
        ("factors", GradientFactors, "of_whole", lambda factors, count: factors),
        ("scale", Given, "shares", unshared),
        ("noise", Trainer, "_forward", noisy),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, attribute, change)
            trainer = make_trainer(data, folder / name, Layout(1, 1, 1), group, "clip", 3)
            curves[name] = go_on(trainer, 0, NUM_STEPS)
            trainer.engine.destroy()
    return curves


@pytest.fixture(scope="module")
def expected(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run_ranks(train_all, 1, tiny_data, tmp_path_factory.mktemp("one"), 1)[0]


@pytest.mark.parametrize(("num_ranks", "tensor_parallel"), list(CASES))
def test_a_layout_trains_as_one_process(
    expected: Found, tiny_data: TinyData, tmp_path: Path, num_ranks: int, tensor_parallel: int
) -> None:
    if num_ranks == 1:
        ranks = [expected]
    else:
        ranks = run_ranks(train_all, num_ranks, tiny_data, tmp_path, tensor_parallel, timeout_s=600)
    for results in ranks:
        for (name, stage, micro_batches), (curve, weights) in results.items():
            if name == "bf16":
                assert_close(f"bf16, ZeRO {stage}", curve[:, 0], expected["clip", 0, 1][0][:, 0], BF16_TOLERANCE)
                continue
            right, right_weights = expected[FIRST[name]]
            if curve is right:
                continue
            what = f"{name}, ZeRO {stage}, {micro_batches} micro-batches"
            assert_as_one_process(what, (curve, weights), (right, right_weights), CURVE_TOLERANCE, WEIGHT_TOLERANCE)


def lengths(group: Group, data: TinyData, folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Without noise: the embeddings' mean lengths that a step tells, those of the same batch, and of other pictures."""
    os.environ.update(RANK=str(group.rank), WORLD_SIZE=str(group.size), LOCAL_RANK=str(group.rank))
    quiet = {"train": {"drop_path": 0.0, "token_drop": 0.0}}
    trainer = make_trainer(data, folder / "quiet", Layout(1, 1, 0), group, "clip", 1, sections=quiet)
    batch = next(trainer.batches(0))
    given = {"image": batch.images_B3SS, "text": batch.fields["tokens"]}
    right, twin = (
        [trainer.embed(name, change(value), is_projected=True).norm(dim=1).mean() for name, value in given.items()]
        for change in (lambda value: value, torch.zeros_like)
    )
    measures = trainer.step(0, iter([batch])).measures
    told = [measures[f"embeddings/norm_{name}"] for name in given]
    return torch.stack(told), torch.stack(right), torch.stack(twin)


def test_lengths_are_those_before_normalising(tiny_data: TinyData, tmp_path: Path) -> None:
    told, right, twin = run_ranks(lengths, 1, tiny_data, tmp_path)[0]
    assert_close("lengths", told, right, 1e-6)
    assert_differs("lengths of others", twin, right, 1e-3)


def test_it_learns(expected: Found) -> None:
    curve, weights = expected["clip", 0, 1]
    assert curve[-1, 0] < curve[0, 0] and curve[0, 2] == pytest.approx(1 / 0.07)
    assert {"objective.log_scale", "text.projection.weight", "projection.weight"} <= weights.keys()
    assert expected["siglip", 0, 2][1]["objective.bias"].item() != -10.0


def test_a_run_goes_on_bit_for_bit_and_from_another_stage(tiny_data: TinyData, tmp_path: Path) -> None:
    found = run_ranks(resume_all, 2, tiny_data, tmp_path)[0]
    assert found["files"] == [
        *("backbone.safetensors", "checkpoint.json", "moments-00000.safetensors", "moments-00001.safetensors"),
        *("objective.safetensors", "text.safetensors"),
    ]
    for stage in (1, 3):
        for to_stage in (1, 3):
            (curve, weights), (right, right_weights) = found[f"{stage} to {to_stage}"], found[f"expected {to_stage}"]
            if stage == to_stage:
                assert torch.equal(curve, right)
                assert all(torch.equal(weights[name], weight) for name, weight in right_weights.items())
            assert_close(f"{stage} to {to_stage}", curve[:, 0], right[:, 0], CURVE_TOLERANCE)


def lit(group: Group, data: TinyData, folder: Path) -> dict[str, Any]:
    """LiT on a trained image tower: what is in the engine and in a checkpoint; resumed; and what is refused."""
    os.environ.update(RANK=str(group.rank), WORLD_SIZE=str(group.size), LOCAL_RANK=str(group.rank))
    train_mlcd(data, folder / "mlcd", group)
    source = newest_checkpoint(folder / "mlcd")
    layout = Layout(group.size, 1, 1)
    trainer = make_trainer(data, folder / "run", layout, group, "lit", 3)
    found: dict[str, Any] = {"names": trainer.state.names, "frozen": trainer.frozen["image"].state_dict()}
    go_on(trainer, 0, 2)
    path = trainer.checkpointer.save(2)
    found["files"], found["manifest"] = sorted(file.name for file in path.iterdir()), read_checkpoint(path)
    found["expected"] = go_on(trainer, 2, NUM_STEPS)
    found["backbone"], found["source"] = load_backbone(path).state_dict(), load_backbone(source).state_dict()
    trainer.engine.destroy()
    again = make_trainer(data, folder / "run", layout, group, "lit", 3)
    assert again.checkpointer.resume() == 2
    found["resumed"] = go_on(again, 2, NUM_STEPS)
    again.engine.destroy()
    group.barrier()
    if group.is_main:  # another tower in its place, as whole as the first
        weights = load_file(source / "backbone.safetensors")
        weights["projection.weight"] += 1e-3
        save_file(weights, source / "backbone.safetensors")
        content = json.loads((source / "checkpoint.json").read_text()) | {"seal": None}
        content["files"]["backbone.safetensors"] = record_of(source / "backbone.safetensors").model_dump()
        write_json(source / "checkpoint.json", content)
    group.barrier()
    for name, call in (
        ("resume", lambda: make_trainer(data, folder / "run", layout, group, "lit", 3)),
        ("evaluate", lambda: load_backbone(path)),
        ("embedding", lambda: make_trainer(data, folder / "other", layout, group, "lit", 3, embed_dim=8)),
    ):
        with pytest.raises(UserError) as error:
            call()
        found[f"refused: {name}"] = str(error.value)
    return found


def test_a_frozen_tower_stays_as_it_is_and_is_not_repeated(tiny_data: TinyData, tmp_path: Path) -> None:
    for found in run_ranks(lit, 2, tiny_data, tmp_path):
        assert all(name.startswith(("text.", "objective.")) for name in found["names"]), "of what the engine trains"
        assert not any(name.startswith(("backbone", "head")) for name in found["files"])
        assert torch.equal(found["resumed"], found["expected"])
        frozen = found["manifest"].frozen["image"]
        assert frozen.source == str(newest_checkpoint(tmp_path / "mlcd").resolve()) and len(frozen.sha256) == 64
        for name, weight in found["source"].items():
            assert torch.equal(found["backbone"][name], weight) and torch.equal(found["frozen"][name], weight), name
        told = "the frozen image tower in .*mlcd/.* is not the one that the run was trained with"
        assert re.search(told, found["refused: resume"]) and re.search(told, found["refused: evaluate"])
        assert "the projection starts at random, and towers.image is frozen" in found["refused: embedding"]


def test_wrong_factors_are_told_apart(expected: Found, tiny_data: TinyData, tmp_path: Path) -> None:
    """The known-bad twins."""
    right = expected["clip", 0, 1][0]
    for name, curve in run_ranks(twins, 1, tiny_data, tmp_path)[0].items():
        assert_differs(name, curve[:, 1], right[:, 1], CURVE_TOLERANCE)
