"""Every layout trains alike: ZeRO stages, tensor-parallel groups, ranks, accumulation, against one process.

Five steps of the whole trainer (loader, backbone in the engine, head, both optimizers) in each; the ranks of a world
are started once and go through all layouts of it.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_harness import TinyData, assert_close, assert_differs, run_ranks
from torch import Tensor
from training_runs import tiny_recipe

import mlcd_ds.engine.trainer as trainer_module
from mlcd_ds.config import Recipe, parse_recipe
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.distributed.ds_config import read_ds_config
from mlcd_ds.distributed.engine_state import engine_state
from mlcd_ds.engine.engine_config import read_layout, resolve_ds_config
from mlcd_ds.engine.gradients import GradientFactors
from mlcd_ds.engine.layout import Layout, check_layout, plan_batches
from mlcd_ds.engine.tensor_parallel import gather_full
from mlcd_ds.engine.trainer import Trainer
from mlcd_ds.engine.training_data import open_training_data
from mlcd_ds.errors import UserError

NUM_STEPS = 5
DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
WORLDS = ((1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (4, 4))  # ranks, ranks of a tensor-parallel group
STAGES, ACCUMULATIONS = (0, 1, 2, 3), (1, 2)
# Measured over all layouts, relative to the largest entry. fp32: losses 5e-8, norms 1.8e-7, weights 4.9e-6 (a moment's
# rounding over its root). 16 bits against fp32: bf16 2.1e-2, fp16 4.2e-4. Muon: losses 7.9e-5, weights 3.6e-3.
CURVE_TOLERANCE, WEIGHT_TOLERANCE = 2e-6, 3e-5
BF16_TOLERANCE = 5e-2
MUON_TOLERANCE, MUON_WEIGHT_TOLERANCE = 5e-4, 5e-3


def make_recipe(data: TinyData, num_micro_batches: int, data_parallel: int, **train: object) -> Recipe:
    content = tiny_recipe(data.index, data.labels)
    content["data"]["num_streams"] = 4
    content["model"]["heads"] = 4
    content["train"] |= {"micro_batch_per_rank": 24 // data_parallel // num_micro_batches, **train}
    return parse_recipe(content, "test")


def make_trainer(recipe: Recipe, layout: Layout, group: Group, config: dict[str, Any]) -> Trainer:
    plan = plan_batches(recipe, layout, group.rank)
    ds_config = resolve_ds_config(config, Path("none"), recipe, layout, plan)
    return Trainer(recipe, ds_config, layout, open_training_data(recipe), group, torch.device("cpu"))


def train(
    recipe: Recipe, layout: Layout, group: Group, config: dict[str, Any] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """fp64 [steps, 3]: loss, gradient norms of backbone and head; the backbone's weights after them."""
    trainer = make_trainer(recipe, layout, group, config or {})
    batches, curve = trainer.batches(0), []
    for step in range(NUM_STEPS):
        result = trainer.step(step, batches)
        curve.append([float(result.loss), float(result.backbone_grad_norm), float(result.measures["grad_norm_head"])])
    batches.close()
    state, tensor_group = engine_state(trainer.engine), trainer.groups.tensor
    weights = {name: gather_full(name, state.get(name), tensor_group).clone() for name in state.names}
    trainer.engine.destroy()
    return torch.tensor(curve, dtype=torch.float64), weights


def train_all(group: Group, data: TinyData, tensor_parallel: int) -> dict:
    """Every stage and accumulation, in bf16 and with Muon too, and on two ranks the files in ds_configs/."""
    os.environ.update(RANK=str(group.rank), WORLD_SIZE=str(group.size), LOCAL_RANK=str(group.rank))
    results = {}
    for stage in STAGES:
        layout = Layout(group.size, tensor_parallel, stage)
        for accumulation in ACCUMULATIONS if tensor_parallel < 4 else (1,):
            recipe = make_recipe(data, accumulation, layout.data_parallel)
            results[stage, accumulation, "fp32"] = train(recipe, layout, group)
        recipe = make_recipe(data, 1, layout.data_parallel, precision="bf16", recompute="block")
        results[stage, 1, "bf16"] = train(recipe, layout, group)
        if stage < 3 and tensor_parallel == 1 and group.size < 4:
            recipe = make_recipe(data, 1, layout.data_parallel)
            muon = recipe.optimizer.model_copy(update={"name": "muon"})
            results[stage, 1, "muon"] = train(recipe.model_copy(update={"optimizer": muon}), layout, group)
    for path in sorted(DS_CONFIGS.glob("*.json")) if group.size == 2 else ():
        config = read_ds_config(path)
        layout = read_layout(config, path, group.size)
        if layout.tensor_parallel == tensor_parallel:
            precision = next(name for name in ("fp32", "fp16", "bf16") if name in path.name)
            if precision == "fp16":  # the first steps are not to be spent on finding a scale
                config["fp16"]["initial_scale_power"] = 4
            recipe = make_recipe(data, 1, layout.data_parallel, precision=precision)
            results[path.name, 1, precision] = train(recipe, layout, group, config)
    return results


@functools.cache
def trained(num_ranks: int, tensor_parallel: int, data: TinyData) -> list[dict]:
    return run_ranks(train_all, num_ranks, data, tensor_parallel, timeout_s=400)


@pytest.mark.parametrize(("num_ranks", "tensor_parallel"), WORLDS)
def test_a_layout_trains_as_one_process(tiny_data: TinyData, num_ranks: int, tensor_parallel: int) -> None:
    expected_curve, expected_weights = trained(1, 1, tiny_data)[0][0, 1, "fp32"]
    for rank, results in enumerate(trained(num_ranks, tensor_parallel, tiny_data)):
        for (stage, accumulation, precision), (curve, weights) in results.items():
            if precision == "muon":
                continue
            what = f"rank {rank}, ZeRO {stage}, {accumulation} micro-batches, {precision}"
            is_exact = precision == "fp32"
            if (num_ranks, stage, accumulation, is_exact) != (1, 0, 1, True):
                for column, name in enumerate(("loss", "backbone norm", "head norm")):
                    tolerance = CURVE_TOLERANCE if is_exact else BF16_TOLERANCE
                    assert_close(f"{what}: {name}", curve[:, column], expected_curve[:, column], tolerance)
                for name, expected in expected_weights.items():
                    if is_exact and not name.endswith("k_proj.bias"):  # no gradient there but rounding
                        assert_close(f"{what}: {name}", weights[name], expected, WEIGHT_TOLERANCE)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_muon_trains_as_one_process(tiny_data: TinyData, num_ranks: int) -> None:
    """It multiplies in 16 bits, where a gradient's last bit may tip a product's."""
    expected, weights = trained(1, 1, tiny_data)[0][0, 1, "muon"]
    adamw, adamw_weights = trained(1, 1, tiny_data)[0][0, 1, "fp32"]
    for stage in (0, 1, 2):
        if (num_ranks, stage) != (1, 0):
            got, got_weights = trained(num_ranks, 1, tiny_data)[0][stage, 1, "muon"]
            assert_close(f"ZeRO {stage}", got[:, 0], expected[:, 0], MUON_TOLERANCE)
            for name in (f"encoder.layers.{layer}.mlp.fc1.weight" for layer in (0, 1)):
                assert_close(f"ZeRO {stage}: {name}", got_weights[name], weights[name], MUON_WEIGHT_TOLERANCE)
    assert_differs("AdamW", expected[:, 0], adamw[:, 0], MUON_TOLERANCE)
    assert_differs("AdamW", weights[name], adamw_weights[name], MUON_WEIGHT_TOLERANCE)


def test_every_file_of_ours_has_run(tiny_data: TinyData) -> None:
    ran = {name for size in (1, 2) for name, *_ in trained(2, size, tiny_data)[0] if isinstance(name, str)}
    assert {path.name for path in DS_CONFIGS.glob("*.json")} == ran


def train_wrongly(group: Group, data: TinyData) -> dict[str, Tensor]:
    """Two ranks whose gradients are averaged twice, and two that take the same images."""
    os.environ.update(RANK=str(group.rank), WORLD_SIZE=str(group.size), LOCAL_RANK=str(group.rank))
    recipe, layout, curves = make_recipe(data, 1, group.size), Layout(group.size, 1, 1), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientFactors, "of", lambda num_micro_batches, data_parallel: GradientFactors(1.0, 1.0))
        curves["averaged twice"] = train(recipe, layout, group)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "plan_batches", lambda recipe, layout, rank: plan_batches(recipe, layout, 0))
        curves["the same images"] = train(recipe, layout, group)[0]
    return curves


def test_wrong_factors_and_wrong_images_are_told_apart(tiny_data: TinyData) -> None:
    """The known-bad twins."""
    expected = trained(1, 1, tiny_data)[0][0, 1, "fp32"][0]
    wrong = run_ranks(train_wrongly, 2, tiny_data)[0]
    assert_differs("averaged twice", wrong["averaged twice"][:, 1], expected[:, 1], CURVE_TOLERANCE)
    assert_differs("the same images", wrong["the same images"][:, 0], expected[:, 0], CURVE_TOLERANCE)


def refusal(data: TinyData, layout: Layout, **train: object) -> str:
    with pytest.raises(UserError) as error:
        check_layout(make_recipe(data, 1, 1, **train), layout)
    return str(error.value)


def test_what_cannot_be_is_refused_with_its_numbers(tiny_data: TinyData) -> None:
    assert "tensor parallel size 2 does not divide the 3 ranks" in refusal(tiny_data, Layout(3, 2))
    assert "tensor parallel size 3 does not divide model.heads 4" in refusal(tiny_data, Layout(3, 3))
    muon = make_recipe(tiny_data, 1, 1)
    muon = muon.model_copy(update={"optimizer": muon.optimizer.model_copy(update={"name": "muon"})})
    with pytest.raises(UserError, match="muon needs whole matrices: ZeRO stage 3"):
        check_layout(muon, Layout(2, 1, 3))
    assert "train.compile is not for tensor-parallel groups" in refusal(tiny_data, Layout(2, 2), compile=True)
    recipe = make_recipe(tiny_data, 1, 1)
    with pytest.raises(UserError, match=r"data.num_streams 4 .* 3 data-parallel ranks"):
        plan_batches(recipe, Layout(6, 2), 0)
    assert [plan_batches(make_recipe(tiny_data, 1, 2), Layout(4, 2), rank).streams for rank in range(4)] == [
        (0, 1),
        (0, 1),
        (2, 3),
        (2, 3),
    ]


def test_a_group_shares_the_loading_of_its_images(tiny_data: TinyData) -> None:
    layout = Layout(4, 2, 1)
    plans = [plan_batches(make_recipe(tiny_data, 2, 2), layout, rank) for rank in range(4)]
    assert [plan.streams for plan in plans] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert [plan.micro_batch for plan in plans] == [6] * 4
    assert [plan.loaded for plan in plans] == [slice(0, 3), slice(3, 6)] * 2
    plans = [plan_batches(make_recipe(tiny_data, 4, 2), layout, rank) for rank in range(4)]
    assert [plan.loaded for plan in plans] == [slice(0, 3)] * 4, "three images are no two equal shares"
