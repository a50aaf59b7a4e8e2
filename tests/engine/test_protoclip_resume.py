"""ProtoCLIP's runs go on in the middle of an episode, which is not clustered again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_harness import TinyData, assert_close, assert_differs, run_ranks
from protoclip_trainers import build, go_on, protoclip_of
from trainers import whole

from mlcd_ds.distributed.collectives import Group
from mlcd_ds.engine.layout import Layout
from mlcd_ds.errors import UserError
from mlcd_ds.objectives.episode import Clusterer

CURVE_TOLERANCE = 5e-6  # as in test_protoclip.py


def resume_all(group: Group, data: TinyData, folder: Path) -> dict[str, Any]:
    """Saved in the middle of an episode under one ZeRO stage, gone on from under each."""
    found: dict[str, Any] = {}
    made: list[int] = []
    make = Clusterer.make

    def counted(self: Clusterer, number: int, *given: Any) -> Any:
        made.append(number)
        return make(self, number, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Clusterer, "make", counted)
        trainer = build(data, folder / "run", Layout(group.size, 1, 1), group, 3)
        found["start"] = go_on(trainer, 0, 3)
        path = trainer.checkpointer.save(3)
        found["files"] = sorted(file.name for file in path.iterdir())
        found["made at first"] = list(made)
        found["expected"] = go_on(trainer, 3, 6), whole(trainer), protoclip_of(trainer).terms.running["text"].mean_H
        trainer.engine.destroy()
        for stage in (1, 3):
            made.clear()
            trainer = build(data, folder / "run", Layout(group.size, 1, stage), group, 3)
            assert trainer.checkpointer.resume() == 3
            curve = go_on(trainer, 3, 6)
            found[f"to {stage}"] = curve, whole(trainer), protoclip_of(trainer).terms.running["text"].mean_H, list(made)
            trainer.engine.destroy()
        trainer = build(data, folder / "run", Layout(group.size, 1, 1), group, 3)
        trainer.checkpointer.resume()
        protoclip_of(trainer).episode = None  # the known-bad twin: clustered again in the middle
        found["twin"] = go_on(trainer, 3, 4)
        trainer.engine.destroy()
    for name, changes in {"teacher": {"teacher": None}, "head": {"head_hidden": 20}}.items():
        other = build(data, folder / "other", Layout(group.size, 1, 1), group, 3, **changes)
        with pytest.raises(UserError) as error:
            other.objective.load(path)
        found[f"refused: {name}"] = str(error.value)
        other.engine.destroy()
    return found


def test_a_run_goes_on_within_an_episode_bit_for_bit(tiny_data: TinyData, tmp_path: Path) -> None:
    found = run_ranks(resume_all, 2, tiny_data, tmp_path)[0]
    assert "prototypes.safetensors" in found["files"] and found["made at first"] == [1]
    right_curve, right_weights, right_mean = found["expected"]
    for stage in (1, 3):
        curve, weights, mean_H, made = found[f"to {stage}"]
        assert made == [2], "the episode that was under way is not clustered again"
        if stage == 1:
            assert torch.equal(curve, right_curve) and torch.equal(mean_H, right_mean)
            assert all(torch.equal(weights[name], weight) for name, weight in right_weights.items())
        assert_close(f"to {stage}", curve[:, 0], right_curve[:, 0], CURVE_TOLERANCE)
    assert "was trained with another external teacher than objective.teacher None now" in found["refused: teacher"]
    assert "holds no running.image.mean of 20: objective.head_hidden is another" in found["refused: head"]
    assert_differs("clustered again", found["twin"][:, 2], right_curve[:1, 2], CURVE_TOLERANCE)
