"""A checkpoint of one layout is gone on from by another: ranks, ZeRO stage, tensor-parallel groups.

In fp32 a chain of five layouts, a step or two each, is the training of one process. In each layout by itself, in each
precision, going on from a checkpoint is going on, bit for bit.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from distributed_harness import TinyData, assert_close, assert_differs, run_ranks
from torch import Tensor
from training_runs import tiny_recipe

from mlcd_ds.config import Recipe, parse_recipe
from mlcd_ds.data.label_store import LabelStore
from mlcd_ds.data.shard_index import ShardIndex
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.distributed.engine_state import EngineState
from mlcd_ds.engine.engine_config import resolve_ds_config
from mlcd_ds.engine.layout import Layout, plan_batches
from mlcd_ds.engine.trainer import Trainer

TOLERANCE, MUON_TOLERANCE = 2e-6, 5e-4  # as in test_layouts.py
# Ranks, ranks of a tensor-parallel group, the ZeRO stage of each of four chains, steps done at its end.
CHAIN = (
    (1, 1, (0, 1, 2, 3), 2),
    (2, 1, (3, 2, 1, 0), 3),
    (2, 2, (1, 3, 0, 2), 4),
    (3, 1, (2, 0, 3, 1), 5),
    (1, 1, (0, 1, 2, 3), 6),
)
MUON_CHAIN = ((1, 1, (0, 1, 2), 2), (3, 1, (2, 0, 1), 4), (2, 1, (1, 2, 0), 6))


@pytest.fixture(autouse=True)
def _without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Muon's products would be compiled, anew in every process."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")


def make_trainer(data: TinyData, out: Path, layout: Layout, group: Group, precision: str, optimizer: str) -> Trainer:
    os.environ.update(RANK=str(group.rank), WORLD_SIZE=str(group.size), LOCAL_RANK=str(group.rank))
    content = tiny_recipe(data.index, data.labels)
    content["train"] |= {"precision": precision, "out": str(out)}
    content["optimizer"]["name"] = optimizer
    recipe: Recipe = parse_recipe(content, "test")
    index, config = ShardIndex(recipe.data.index), {}
    if precision == "fp16":
        config["fp16"] = {"initial_scale_power": 4, "loss_scale_window": 2}  # the scale changes on the way
    ds_config = resolve_ds_config(config, Path("none"), recipe, layout, plan_batches(recipe, layout, group.rank))
    device = torch.device("cpu")
    return Trainer(recipe, ds_config, layout, index, LabelStore(recipe.data.labels, index), group, device)


def go_on(trainer: Trainer, first: int, end: int) -> Tensor:
    """fp64 [steps, 3]: loss and both gradient norms of steps `first` ... `end` - 1."""
    batches, curve = trainer.batches(first), []
    for step in range(first, end):
        result = trainer.step(step, batches)
        curve.append([float(result.loss), float(result.backbone_grad_norm), float(result.head_grad_norm)])
    batches.close()
    return torch.tensor(curve, dtype=torch.float64)


def link_of_chains(
    group: Group, data: TinyData, folder: Path, tensor_parallel: int, stages: tuple[int, ...], end: int, optimizer: str
) -> list[Tensor]:
    curves = []
    for chain, stage in enumerate(stages):
        layout = Layout(group.size, tensor_parallel, stage)
        trainer = make_trainer(data, folder / f"chain{chain}", layout, group, "fp32", optimizer)
        first = trainer.checkpointer.resume()
        curves.append(go_on(trainer, first, end))
        trainer.checkpointer.save(end)
        trainer.engine.destroy()
    return curves


@pytest.mark.parametrize(("optimizer", "links"), [("adamw", CHAIN), ("muon", MUON_CHAIN)])
def test_a_chain_of_layouts_is_one_training(tiny_data: TinyData, tmp_path: Path, optimizer: str, links: tuple) -> None:
    last = links[-1][-1]
    whole = run_ranks(link_of_chains, 1, tiny_data, tmp_path / "whole", 1, (0,), last, optimizer)[0][0]
    tolerance = TOLERANCE if optimizer == "adamw" else MUON_TOLERANCE
    first = 0
    for num_ranks, tensor_parallel, stages, end in links:
        args = (tiny_data, tmp_path, tensor_parallel, stages, end, optimizer)
        for curves in run_ranks(link_of_chains, num_ranks, *args, timeout_s=300):
            for stage, curve in zip(stages, curves, strict=True):
                what = f"{num_ranks} ranks, ZeRO {stage}, tensor parallel {tensor_parallel}, step {first}"
                assert len(curve) == end - first, what
                columns = 3 if optimizer == "adamw" else 1  # Muon's norms are of what a stage makes of the gradient
                assert_close(what, curve[:, :columns], whole[first:end, :columns], tolerance)
        folder = tmp_path / f"chain0/checkpoints/step_{end:08d}"
        parts = [path.stat() for path in folder.glob("moments-*.safetensors")]
        sizes = [part.st_size for part in parts]
        assert len(parts) == num_ranks, "each rank writes its share"
        assert optimizer == "muon" or max(sizes) < 3 * min(sizes), "as near as whole tensors can be dealt"
        assert {part.st_mode & 0o666 for part in parts} == {folder.stat().st_mode & 0o666}
        first = end


def resume_in_place(group: Group, data: TinyData, folder: Path, tensor_parallel: int) -> dict[str, tuple]:
    found = {}
    kinds = [(precision, "adamw", stage) for precision in ("fp32", "bf16", "fp16") for stage in range(4)]
    kinds += [("bf16", "muon", stage) for stage in range(3)] if tensor_parallel == 1 else []
    for precision, optimizer, stage in kinds:
        name, layout = f"{precision}-{optimizer}-{stage}", Layout(group.size, tensor_parallel, stage)
        trainer = make_trainer(data, folder / name, layout, group, precision, optimizer)
        assert EngineState(trainer.engine).num_updates == 0
        go_on(trainer, 0, 3)
        assert 0 < EngineState(trainer.engine).num_updates <= 3
        trainer.checkpointer.save(3)
        expected = go_on(trainer, 3, 5)
        trainer.engine.destroy()
        trainer = make_trainer(data, folder / name, layout, group, precision, optimizer)
        assert trainer.checkpointer.resume() == 3
        resumed = go_on(trainer, 3, 5)
        trainer.engine.destroy()
        found[name] = (expected, resumed)
    return found


@pytest.mark.parametrize(("num_ranks", "tensor_parallel"), [(1, 1), (2, 1), (2, 2)])
def test_a_layout_goes_on_bit_for_bit(
    tiny_data: TinyData, tmp_path: Path, num_ranks: int, tensor_parallel: int
) -> None:
    for results in run_ranks(resume_in_place, num_ranks, tiny_data, tmp_path, tensor_parallel, timeout_s=300):
        for name, (expected, resumed) in results.items():
            assert torch.isfinite(expected).all(), name
            assert torch.equal(resumed, expected), f"{name}: {resumed} is not {expected}"


def without_moments(group: Group, data: TinyData, folder: Path) -> tuple[Tensor, Tensor]:
    trainer = make_trainer(data, folder, Layout(1), group, "fp32", "adamw")
    go_on(trainer, 0, 3)
    trainer.checkpointer.save(3)
    expected = go_on(trainer, 3, 5)
    trainer = make_trainer(data, folder, Layout(1), group, "fp32", "adamw")
    trainer.checkpointer.resume()
    for state in trainer.engine.optimizer.state.values():
        state["exp_avg"].zero_()
    return expected, go_on(trainer, 3, 5)


def test_lost_moments_show(tiny_data: TinyData, tmp_path: Path) -> None:
    """The known-bad twin of both."""
    expected, bad = run_ranks(without_moments, 1, tiny_data, tmp_path)[0]
    assert_differs("second step after", bad[1], expected[1], MUON_TOLERANCE)
