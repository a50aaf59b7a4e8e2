"""A gradient that is not finite moves nothing, at any ZeRO stage and precision; what is not finite is never saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed_harness import TinyData, run_ranks
from torch import Tensor
from trainers import go_on, make_trainer

from mlcd_ds.distributed.collectives import Group
from mlcd_ds.distributed.engine_state import engine_state
from mlcd_ds.engine import trainer as trainer_module
from mlcd_ds.engine.layout import Layout
from mlcd_ds.engine.trainer import Trainer
from mlcd_ds.errors import UserError

KINDS = [(precision, "adamw", stage) for precision in ("fp32", "bf16", "fp16") for stage in (0, 1, 3)]
KINDS += [("fp32", "adamw", 2), ("fp32", "muon", 0), ("fp32", "muon", 1)]
INFINITY = float("inf")


@pytest.fixture(autouse=True)
def _without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # Muon's products


def content(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of all weights and moments of backbone and head."""
    state = engine_state(trainer.engine)
    found = {name: state.get(name).clone() for name in state.names}
    for name in state.names:
        found |= {f"{moment}/{name}": state.get(name, moment).clone() for moment in state.moments(name)}
    objective = trainer.objective
    head = {"head": objective.head.weight_LE, **objective.optimizer.state}
    return found | {name: tensor.clone() for name, tensor in head.items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def spoiled_steps(group: Group, data: TinyData, folder: Path) -> dict[str, dict]:
    """In each kind: a good step, one whose backbone's gradient is infinite on the last rank, one whose head's is, on
    all; and a good one."""
    found = {}
    for precision, optimizer, stage in KINDS:
        name = f"{precision}-{optimizer}-{stage}"
        trainer = make_trainer(data, folder / name, Layout(group.size, 1, stage), group, precision, optimizer)
        good, bad = trainer.factors, replace(trainer.factors, outputs=INFINITY)
        go_on(trainer, 0, 1)
        first = content(trainer)
        trainer.factors = bad if group.rank == group.size - 1 else good
        loss, norm, _ = go_on(trainer, 1, 2)[0].tolist()
        second = content(trainer)
        trainer.factors = replace(good, own=INFINITY)
        head_norm = go_on(trainer, 2, 3)[0, 2].item()
        third = content(trainer)
        trainer.factors = good
        last = go_on(trainer, 3, 4)[0]
        fourth, num_updates = content(trainer), engine_state(trainer.engine).num_updates
        trainer.checkpointer.save(4)
        trainer.engine.destroy()
        found[name] = {
            "finite loss": loss < INFINITY,
            "norms": (norm, head_norm),
            "changed": [changed(first, second), changed(second, third)],
            "went on": bool(last.isfinite().all()) and len(changed(third, fourth)) > 20,
            "updates": num_updates,
        }
    return found


def test_a_gradient_that_is_not_finite_moves_nothing(tiny_data: TinyData, tmp_path: Path) -> None:
    for results in run_ranks(spoiled_steps, 2, tiny_data, tmp_path, timeout_s=300):
        assert len(results) == len(KINDS)
        for name, result in results.items():
            assert result["finite loss"] and result["went on"], name
            assert not any(norm < INFINITY for norm in result["norms"]), name
            of_backbone, of_head = ("head", "exp_avg", "exp_avg_sq", "step"), result["changed"][1]
            assert result["changed"][0] <= set(of_backbone), f"{name}: {result['changed'][0]} moved"
            assert "head" in result["changed"][0] and not of_head & set(of_backbone), name
            assert result["updates"] == 3, f"{name}: a skipped step is no update"


def unguarded(group: Group, data: TinyData, folder: Path) -> tuple[bool, str]:
    """Without the guard of stage 0: what DeepSpeed does with such a gradient, and whether that is saved."""
    trainer = make_trainer(data, folder, Layout(1), group)
    trainer.factors = replace(trainer.factors, outputs=INFINITY)
    trainer_module.step_engine = lambda engine: engine.step()
    batches = trainer.batches(0)
    loss = trainer.step(0, batches).loss
    batches.close()
    with pytest.raises(UserError) as error:
        trainer.checkpointer.save(1)
    assert not any((folder / "checkpoints").glob("*"))
    return bool(loss.isfinite()), str(error.value)


def test_weights_that_are_not_finite_are_not_saved(tiny_data: TinyData, tmp_path: Path) -> None:
    """Also the twin of the test above: without the guard the weights are spoiled."""
    is_finite, message = run_ranks(unguarded, 1, tiny_data, tmp_path)[0]
    assert is_finite and "not finite after step 1" in message and "optimizer.lr" in message
