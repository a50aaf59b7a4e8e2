"""Runs that are killed, stopped, damaged or out of disk: what they resume from, and what they say."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from distributed_harness import TinyData, quiet_environment
from training_runs import DS_CONFIG, Training, assert_same_end, checkpoints, final_bytes, metrics, start, write_recipe

from mlcd_ds.engine.weights import load_backbone

pytestmark = pytest.mark.pipeline
# Long enough to be killed in time: a step takes about 10 ms.
LONG = ("train.steps=60", "train.checkpoint_every=20", "head.sample_rate=0.5")


@dataclass(frozen=True)
class Bench:
    """Where this module's runs stand."""

    folder: Path
    recipe: Path

    def start(
        self, name: str, *overrides: str, run: tuple[str, int] = ("python", 1), ds_config: Path = DS_CONFIG
    ) -> Training:
        env = quiet_environment()
        return start(self.recipe, self.folder / name, *overrides, run=run, env=env, ds_config=ds_config)


@pytest.fixture(scope="module")
def bench(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("resume")
    return Bench(folder, write_recipe(folder / "tiny.yaml", tiny_data.index, tiny_data.labels))


@pytest.fixture(scope="module")
def uninterrupted(bench: Bench) -> Path:
    """A finished run of `LONG` on one rank."""
    training = bench.start("uninterrupted", *LONG)
    assert training.wait() == 0, training.text
    return training.out


@pytest.fixture(scope="module")
def stopped(bench: Bench) -> Training:
    """A run of 100,000 steps that SIGTERM has ended."""
    training = bench.start("stopped", "train.steps=100000", "train.checkpoint_every=20", "train.keep_checkpoints=2")
    training.until_step(45)
    training.process.send_signal(signal.SIGTERM)
    training.wait()
    return training


@pytest.fixture
def copy(stopped: Training, bench: Bench, request: pytest.FixtureRequest) -> str:
    """Name of a copy of the stopped run, for this test alone."""
    name = request.node.name
    shutil.copytree(stopped.out, bench.folder / name)
    return name


def test_a_run_killed_three_times_ends_as_if_nothing_had_happened(bench: Bench, uninterrupted: Path) -> None:
    training = bench.start("killed", *LONG)
    training.until_step(5)
    training.kill()
    assert not checkpoints(training.out), "killed before the first checkpoint"

    training = bench.start("killed", *LONG)
    training.kill_inside_a_save()
    assert any((training.out / "checkpoints").glob(".step_*.partial"))

    training = bench.start("killed", *LONG)
    training.until_step(25)
    training.kill()
    assert [path.name for path in checkpoints(training.out)][:1] == ["step_00000020"]
    assert len(metrics(training.out)) < 60

    training = bench.start("killed", *LONG)
    assert training.wait() == 0, training.text
    assert_same_end(training.out, uninterrupted)
    assert not any((training.out / "checkpoints").glob(".*")), "left-overs of the kills are gone"


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_two_ranks_resume_bit_for_bit(bench: Bench, tensor_parallel: int) -> None:
    shared_memory = sorted(Path("/dev/shm").glob("*deepspeed*"))
    ds_config = bench.folder / f"tp{tensor_parallel}.json"
    content = json.loads(DS_CONFIG.read_text()) | {"tensor_parallel": {"autotp_size": tensor_parallel}}
    ds_config.write_text(json.dumps(content))
    name, run = f"tp{tensor_parallel}", ("torchrun", 2)
    whole = bench.start(f"whole-{name}", *LONG, run=run, ds_config=ds_config)
    assert whole.wait() == 0, whole.text
    training = bench.start(f"killed-{name}", *LONG, run=run, ds_config=ds_config)
    training.until_step(30)
    training.kill()
    assert [path.name for path in checkpoints(training.out)] == ["step_00000020"]
    training = bench.start(f"killed-{name}", *LONG, run=run, ds_config=ds_config)
    assert training.wait() == 0, training.text
    assert_same_end(training.out, whole.out)
    assert sorted(Path("/dev/shm").glob("*deepspeed*")) == shared_memory, "nothing is left in memory by a kill"


def test_a_run_of_phases_resumes_in_each_of_them(bench: Bench) -> None:
    phases = "train.phases=[{until: 25, image_size: 48, token_drop: 0.5}, {until: 45, image_size: 16}]"
    whole = bench.start("whole-phases", *LONG, phases)
    assert whole.wait() == 0, whole.text
    for until in (22, 42):
        training = bench.start("killed-phases", *LONG, phases)
        training.until_step(until)
        training.kill()
    training = bench.start("killed-phases", *LONG, phases)
    assert training.wait() == 0, training.text
    assert_same_end(training.out, whole.out)
    work = [entry["speed/tflops_per_rank"] / entry["speed/images_per_s"] for entry in metrics(whole.out)]
    assert len({round(value, 12) for value in work}) == 3, "three kinds of steps"


def test_another_seed_ends_elsewhere(bench: Bench, uninterrupted: Path) -> None:
    """The known-bad twin: the comparison of final files can fail."""
    training = bench.start("other-seed", *LONG, "train.seed=2")
    assert training.wait() == 0, training.text
    with pytest.raises(AssertionError):
        assert_same_end(training.out, uninterrupted)
    different = [
        name for name, content in final_bytes(uninterrupted).items() if final_bytes(training.out)[name] != content
    ]
    assert len(different) == 3, "backbone, moments, head"


def test_sigterm_saves_and_asks_to_be_started_again(stopped: Training) -> None:
    assert stopped.process.returncode == 85, stopped.text
    newest = checkpoints(stopped.out)[-1]
    assert int(newest.name.removeprefix("step_")) == len(metrics(stopped.out)) >= 45
    assert "Start again" in stopped.text and "Traceback" not in stopped.text


def one_message(training: Training) -> str:
    """The single error message of a run that ended with status 2, without a stack trace."""
    assert training.wait() == 2, training.text
    errors = [line for line in training.text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in training.text, training.text
    return errors[0]


@pytest.mark.parametrize("name", ["backbone.safetensors", "moments-00000.safetensors", "checkpoint.json"])
def test_a_damaged_checkpoint_is_named_with_the_fix(bench: Bench, copy: str, name: str) -> None:
    newest = checkpoints(bench.folder / copy)[-1]
    content = bytearray((newest / name).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / name).write_bytes(content if name != "checkpoint.json" else content[:-20])
    overrides = ("train.steps=100000", "train.checkpoint_every=20", "train.keep_checkpoints=2")
    message = one_message(bench.start(copy, *overrides))
    assert str(newest / name) in message and f"Remove {newest}" in message


def test_a_half_deleted_checkpoint_is_set_aside(bench: Bench, uninterrupted: Path) -> None:
    out = bench.folder / "half-deleted"
    shutil.copytree(uninterrupted, out)
    (out / "manifest.json").unlink()
    newest = checkpoints(out)[-1]
    (newest / "checkpoint.json").unlink()
    training = bench.start("half-deleted", *LONG)
    assert training.wait() == 0, training.text
    assert f"{newest} has no checkpoint.json: it is set aside" in training.text
    assert_same_end(out, uninterrupted)
    (aside,) = (out / "checkpoints").glob(f"incomplete_{newest.name}_*")
    assert (aside / "backbone.safetensors").exists()


@pytest.mark.parametrize("gone", ["checkpoints", "checkpoint.json", "head"])
def test_a_finished_run_without_its_last_checkpoint_is_not_done(bench: Bench, uninterrupted: Path, gone: str) -> None:
    out = bench.folder / f"gone-{gone}"
    shutil.copytree(uninterrupted, out)
    newest = checkpoints(out)[-1]
    if gone == "checkpoints":
        shutil.rmtree(out / "checkpoints")
    else:
        (path,) = newest.glob(f"{gone}*")
        path.unlink()
    message = one_message(bench.start(out.name, *LONG))
    assert str(newest) in message and "is missing" in message and f"remove {out / 'manifest.json'}" in message
    if gone == "head":  # the advice holds: what is damaged is told, too
        (out / "manifest.json").unlink()
        shutil.rmtree(newest)
        training = bench.start(out.name, *LONG)
        assert training.wait() == 0, training.text
        assert_same_end(out, uninterrupted)


def test_another_number_of_ranks_goes_on(bench: Bench, copy: str) -> None:
    done = len(metrics(bench.folder / copy))
    overrides = ("train.steps=100000", "train.checkpoint_every=20", "train.keep_checkpoints=2", "head.parallel_size=1")
    training = bench.start(copy, *overrides, run=("torchrun", 2))
    training.until_step(done + 5)
    training.signal_all(signal.SIGTERM)
    training.wait()
    newest = json.loads((checkpoints(training.out)[-1] / "checkpoint.json").read_text())
    assert newest["num_ranks"] == 2 and newest["step"] == len(metrics(training.out)) >= done + 5


def test_a_checkpoint_of_an_earlier_version_is_told(bench: Bench, copy: str) -> None:
    newest = checkpoints(bench.folder / copy)[-1]
    content = json.loads((newest / "checkpoint.json").read_text())
    del content["num_updates"], content["loss_scale"], content["seal"]
    (newest / "checkpoint.json").write_text(json.dumps(content))
    load_backbone(newest)
    message = one_message(bench.start(copy, "train.steps=100000"))
    assert str(newest) in message and "saved by an earlier version" in message and "Remove" not in message


def test_a_checkpoint_of_other_labels_is_told(bench: Bench, copy: str) -> None:
    newest = checkpoints(bench.folder / copy)[-1]
    content = json.loads((newest / "checkpoint.json").read_text())
    del content["seal"]
    content["inputs"]["labels"] = "0" * 64
    (newest / "checkpoint.json").write_text(json.dumps(content))
    message = one_message(bench.start(copy, "train.steps=100000"))
    assert f"{newest} was trained on other labels than data.labels names now" in message


def test_a_changed_key_is_named(bench: Bench, copy: str) -> None:
    message = one_message(bench.start(copy, "train.steps=100000", "optimizer.lr=2e-3"))
    assert "another optimizer.lr: choose another train.out" in message


@pytest.fixture
def small_disk(bench: Bench) -> Iterator[Path]:
    """A file system with room for one checkpoint and a half, at full-disk/checkpoints."""
    folder = bench.folder / "full-disk" / "checkpoints"
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_one_message_and_the_run_goes_on_later(
    bench: Bench, small_disk: Path, uninterrupted: Path
) -> None:
    training = bench.start("full-disk", *LONG)
    message = one_message(training)
    assert str(small_disk / "step_00000040") in message and "disk is full" in message
    assert [path.name for path in small_disk.iterdir()] == ["step_00000020"], "only what is whole is left"

    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    training = bench.start("full-disk", *LONG)
    assert training.wait() == 0, training.text
    assert_same_end(training.out, uninterrupted)
