"""The weights' moving average in every ZeRO family and across layouts; and kNN, which leaves the training as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_harness import TinyData, assert_close, assert_differs, run_ranks
from safetensors.torch import load_file
from torch import Tensor
from trainers import go_on, make_trainer, whole
from training_runs import tiny_recipe

from mlcd_ds.config import parse_recipe
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.distributed.engine_state import AVERAGE
from mlcd_ds.engine.labelled_images import LabelledImages
from mlcd_ds.engine.layout import Layout
from mlcd_ds.engine.monitors import KnnMonitor
from mlcd_ds.engine.schedule import average_decay
from mlcd_ds.errors import UserError

DECAY = 0.3
Results = dict[str, dict[str, Any]]
KINDS = (("fp32", "adamw", 0), ("fp16", "adamw", 0), ("bf16", "adamw", 2), ("fp32", "adamw", 3), ("fp32", "muon", 1))


@pytest.fixture(autouse=True)
def _without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # Muon's products


def averaged_run(group: Group, data: TinyData, folder: Path) -> Results:
    """Four steps with average and kNN, saved after two; beside the same without either."""
    found: Results = {}
    for precision, optimizer, stage in KINDS:
        name, layout = f"{precision}-{optimizer}-{stage}", Layout(group.size, 1, stage)
        plain = make_trainer(data, folder / "plain", layout, group, precision, optimizer)
        expected = go_on(plain, 0, 4)
        plain.engine.destroy()
        extras: dict[str, dict[str, object]] = {
            "train": {"ema_decay": DECAY, "knn_every": 1},
            "data": {"knn_index": str(data.index)},
        }
        trainer = make_trainer(data, folder / name, layout, group, precision, optimizer, sections=extras)
        knn = trainer.monitors["knn"][1]
        reference, curves, accuracies = whole(trainer), [], []
        for step in range(4):
            curves.append(go_on(trainer, step, step + 1))
            decay = average_decay(step, DECAY)
            weights = whole(trainer)
            reference = {key: torch.lerp(reference[key], weights[key], 1 - decay) for key in weights}
            accuracies.append(knn.accuracy())
            if step == 1:
                trainer.checkpointer.save(2)
        average = whole(trainer, AVERAGE)
        trainer.engine.destroy()
        again = make_trainer(data, folder / name, layout, group, precision, optimizer, sections=extras)
        assert again.checkpointer.resume() == 2
        go_on(again, 2, 4)
        found[name] = {
            "expected": expected,
            "curve": torch.cat(curves),
            "average": average,
            "reference": reference,
            "weights": whole(again),
            "resumed": whole(again, AVERAGE),
            "accuracies": accuracies,
        }
        again.engine.destroy()
    sections: dict[str, dict[str, object]] = {"train": {"ema_decay": DECAY + 0.01}}
    twin = make_trainer(data, folder / "twin", Layout(group.size), group, sections=sections)
    go_on(twin, 0, 4)
    found["fp32-adamw-0"]["other decay"] = whole(twin, AVERAGE)
    return found


@pytest.fixture(scope="module")
def averaged(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Results]]:
    folder = tmp_path_factory.mktemp("averaged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        return folder, run_ranks(averaged_run, 2, tiny_data, folder, timeout_s=300)


def test_the_average_is_that_of_whole_weights_and_goes_on_bit_for_bit(averaged: tuple[Path, list]) -> None:
    for results in averaged[1]:
        for kind, result in results.items():
            assert result["average"].keys() == result["weights"].keys()
            for name, average in result["average"].items():
                assert_close(f"{kind}: {name}", average, result["reference"][name], 0.0)
                assert_close(f"{kind}, resumed: {name}", result["resumed"][name], average, 0.0)
            name = "encoder.layers.0.mlp.fc1.weight"
            assert_differs(f"{kind}: the last weights", result["average"][name], result["weights"][name], 1e-6)


def test_another_decay_shows(averaged: tuple[Path, list]) -> None:
    """The known-bad twin: a decay off by a hundredth."""
    result, name = averaged[1][0]["fp32-adamw-0"], "encoder.layers.0.mlp.fc1.weight"
    assert_differs("decay", result["average"][name], result["other decay"][name], 1e-7)


def test_knn_and_average_leave_the_training_as_it_is(averaged: tuple[Path, list]) -> None:
    first, second = averaged[1]
    for kind, result in first.items():
        assert torch.equal(result["curve"], result["expected"]), kind
        assert all(0 < accuracy <= 1 for accuracy in result["accuracies"]), kind
        assert second[kind]["accuracies"] == result["accuracies"]


def other_layouts(
    group: Group, data: TinyData, folder: Path, layouts: tuple[Layout, ...]
) -> dict[str, dict[str, Tensor]]:
    """The average that each layout reads from stage 3's checkpoint."""
    found = {}
    for layout in layouts:
        trainer = make_trainer(data, folder, layout, group, sections={"train": {"ema_decay": DECAY}})
        assert trainer.checkpointer.resume() == 2
        found[f"{layout}"] = whole(trainer, AVERAGE)
        trainer.engine.destroy()
    if group.size == 1:
        found["started"] = started(group, data, folder)
    return found


def started(group: Group, data: TinyData, folder: Path) -> dict[str, Tensor]:
    """What a run begins to average that had no average before."""
    trainer = make_trainer(data, folder, Layout(1), group)
    trainer.checkpointer.resume()
    trainer.checkpointer.save(3)
    assert not (folder / "checkpoints/step_00000003/ema.safetensors").exists()
    trainer = make_trainer(data, folder, Layout(1), group, sections={"train": {"ema_decay": DECAY}})
    assert trainer.checkpointer.resume() == 3
    return whole(trainer, AVERAGE)


def test_another_layout_reads_the_average(averaged: tuple[Path, list], tiny_data: TinyData) -> None:
    folder = averaged[0] / "fp32-adamw-3"
    checkpoint = folder / "checkpoints/step_00000002"
    saved, last = load_file(checkpoint / "ema.safetensors"), load_file(checkpoint / "backbone.safetensors")
    for layouts in ((Layout(2, 2, 1),), (Layout(1, 1, 0), Layout(1, 1, 2))):
        for results in run_ranks(other_layouts, layouts[0].num_ranks, tiny_data, folder, layouts):
            begun = results.pop("started", None)
            assert len(results) == len(layouts)
            for layout, average in results.items():
                for name, expected in saved.items():
                    assert torch.equal(average[name], expected), f"{layout}: {name}"
    assert begun
    for name, weight in last.items():
        assert torch.equal(begun[name], weight), f"without one it starts from the weights: {name}"
    assert not torch.equal(saved[name], last[name])


def test_knn_without_an_index_is_refused(tiny_data: TinyData) -> None:
    content = tiny_recipe(tiny_data.index, tiny_data.labels)
    content["train"]["knn_every"] = 10
    with pytest.raises(UserError, match=r"data\.knn_index"):
        parse_recipe(content, "test")


def knn_alone(group: Group, data: TinyData, folder: Path) -> tuple[list[float], str]:
    """The same backbone's accuracy, in batches of 7 and of 64; and what is said of an index without labels."""
    sections: dict[str, dict[str, object]] = {"data": {"knn_index": str(data.index)}}
    trainer = make_trainer(data, folder, Layout(group.size), group, sections=sections)

    def monitor(size: int, **keys: str) -> KnnMonitor:
        recipe = trainer.recipe.model_copy(update={"data": trainer.recipe.data.model_copy(update=keys)})
        return KnnMonitor(LabelledImages(recipe, size, trainer.layout, group, trainer.device), trainer.embed)

    with pytest.raises(UserError) as error:
        monitor(7, knn_label_key="x")
    return [monitor(size).accuracy() for size in (7, 64)], str(error.value)


def test_the_accuracy_depends_on_neither_ranks_nor_batches(tiny_data: TinyData, tmp_path: Path) -> None:
    accuracies = set()
    for num_ranks in (1, 3):
        found, refusal = run_ranks(knn_alone, num_ranks, tiny_data, tmp_path)[0]
        accuracies |= {*found}
        assert "0 samples have a label under 'x'" in refusal
    assert len(accuracies) == 1
