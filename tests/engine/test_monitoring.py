"""What a run tells of itself, and what it keeps: times, skipped steps, a trace, kNN, milestones, the average."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_harness import TinyData, quiet_environment
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import DS_CONFIG, checkpoints, metrics, start, tiny_recipe, write_recipe

from mlcd_ds.encoders.registry import load_encoder
from mlcd_ds.engine.profiling import StepProfiler
from mlcd_ds.engine.schedule import average_decay
from mlcd_ds.engine.step_clock import PARTS, StepClock
from mlcd_ds.engine.weights import load_backbone
from mlcd_ds.errors import UserError
from mlcd_ds.models.vit import ViTConfig, flops_per_image

TINY = ViTConfig.model_validate(tiny_recipe(Path(), Path())["model"])
SCALE_POWER = 16  # too high for the first steps


@pytest.fixture(scope="module")
def monitored(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of eight steps in fp16, with everything switched on."""
    folder = tmp_path_factory.mktemp("monitored")
    recipe = write_recipe(folder / "tiny.yaml", tiny_data.index, tiny_data.labels)
    ds_config = folder / "fp16.json"
    fp16 = {"enabled": "auto", "initial_scale_power": SCALE_POWER, "hysteresis": 1}
    without_bf16 = {key: value for key, value in json.loads(DS_CONFIG.read_text()).items() if key != "bf16"}
    ds_config.write_text(json.dumps(without_bf16 | {"fp16": fp16}))
    overrides = (
        "train.precision=fp16",
        "train.ema_decay=0.9",
        "train.knn_every=3",
        f"data.knn_index={tiny_data.index}",
    )
    overrides = (*overrides, "train.profile_steps=[2,3]", "train.milestone_every=3", "train.keep_checkpoints=1")
    overrides = (*overrides, "train.checkpoint_every=2", "train.log_every=2")
    training = start(recipe, folder / "run", *overrides, env=quiet_environment(), ds_config=ds_config)
    assert training.wait() == 0, training.text
    return training.out


@pytest.mark.pipeline
def test_the_log_tells_times_skipped_steps_and_the_loss_scale(monitored: Path) -> None:
    entries = [entry for entry in metrics(monitored) if "loss/total" in entry]
    assert [entry["step"] for entry in entries] == [2, 4, 6, 8]
    for entry in entries:
        parts = [entry[f"time/{part}_s"] for part in PARTS]
        assert min(parts) >= 0 and sum(parts) == pytest.approx(entry["time/step_s"])
        assert entry["optimizer/skipped_head"] == 0
        flops = 1e12 * entry["speed/tflops_per_rank"] / entry["speed/images_per_s"]
        assert flops == pytest.approx(3 * flops_per_image(TINY, token_drop=0.25))
    skipped = [entry["optimizer/skipped_backbone"] for entry in entries]
    assert skipped[0] == 2 and skipped[-1] == 0
    scales = [entry["optimizer/loss_scale"] for entry in entries]
    assert scales == [2.0 ** (SCALE_POWER - sum(skipped[: number + 1])) for number in range(4)]
    norms = [entry["optimizer/grad_norm_backbone"] for entry in entries]
    assert norms[0] is None and 0 < norms[-1] < 100, "null: what is not finite is no JSON"
    events = EventAccumulator(str(monitored / "tensorboard"))
    events.Reload()
    assert {"time/backward_s", "optimizer/loss_scale", "optimizer/skipped_backbone", "evaluation/knn"} <= {
        *events.Tags()["scalars"]
    }


@pytest.mark.pipeline
def test_knn_trace_and_milestones(monitored: Path) -> None:
    knn = {entry["step"]: entry["evaluation/knn"] for entry in metrics(monitored) if "evaluation/knn" in entry}
    assert [*knn] == [3, 6, 8] and all(0 < accuracy <= 1 for accuracy in knn.values())
    (trace,) = (monitored / "profile").iterdir()
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert trace.name == "steps_2-3.json.gz" and "aten::addmm" in names
    assert [int(path.name[-8:]) for path in checkpoints(monitored)] == [3, 6, 8], "milestones and the newest"


@pytest.mark.pipeline
def test_the_average_is_evaluated_and_exported_by_name(monitored: Path, tmp_path: Path) -> None:
    newest = checkpoints(monitored)[-1]
    average, last = load_backbone(newest, "ema").state_dict(), load_backbone(newest).state_dict()
    saved = load_file(newest / "ema.safetensors")
    assert all(torch.equal(average[name], tensor) for name, tensor in saved.items())
    command = [sys.executable, "-m", "mlcd_ds", "export", "--run", str(monitored), "--weights", "ema"]
    subprocess.run([*command, "--out", str(tmp_path / "export")], env=quiet_environment(), check=True)
    exported = load_file(tmp_path / "export/projection.safetensors")["projection.weight"]
    assert torch.equal(exported, saved["projection.weight"])
    encoder = load_encoder(f"ema:{monitored}")
    assert torch.equal(encoder.network.state_dict()["projection.weight"], exported)
    assert encoder.fingerprint() != load_encoder(str(monitored)).fingerprint()
    assert last.keys() == average.keys()


def test_a_folder_without_an_average_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="comes the folder of a training run"):
        load_encoder(f"ema:{tmp_path}")


def test_parts_add_up_to_the_step() -> None:
    clock = StepClock(torch.device("cpu"))
    for _ in range(3):
        clock.start()
        clock.mark("data")
        sum(range(10_000))
        clock.mark("head")
        clock.mark("data")
        sum(range(100_000))  # between the steps
    times = clock.read()
    assert times["step"] == sum(times[part] for part in PARTS) and times["forward"] == 0
    assert times["head"] > times["data"] > 0
    assert clock.read()["step"] == 0, "each entry has its own steps"


def test_a_trace_that_is_cut_short_is_written(tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path, (3, 9))
    for step in (1, 2, 3):
        profiler.before(step)
        torch.ones(2).sum()
        profiler.after(step)
    profiler.close()
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["steps_3-4.json.gz"]
    profiler.close()


def test_the_average_decays_faster_at_first() -> None:
    decays = [average_decay(step, 0.999) for step in (0, 10, 100, 10_000)]
    assert decays == [0.1, 0.55, 101 / 110, 0.999] and math.isclose(decays[2], 0.918, abs_tol=1e-3)
