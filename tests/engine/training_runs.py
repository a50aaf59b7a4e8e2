"""Real trainings in child processes: start, watch, kill, and read what they leave behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
DS_CONFIG = ROOT / "ds_configs/zero1_fp32_cpu.json"
TIMEOUT_S = 240.0
POLL_S = 0.001
COLUMNS = ("loss/total", "loss/negatives", "loss/positives", "optimizer/grad_norm_backbone", "optimizer/grad_norm_head")


def tiny_recipe(index: Path, labels: Path) -> dict[str, Any]:
    """Eight steps of a tiny ViT; both clip norms act, and every class is a negative. All noise is switched on."""
    return {
        "description": "eight steps of a tiny ViT",
        "model": dict(image_size=32, patch_size=16, width=32, depth=2, heads=2, mlp_width=64, embed_dim=16),
        "data": {"index": str(index), "labels": str(labels), "num_streams": 6, "shuffle_window": 32, "num_threads": 1}
        | {"augment": {"color_jitter": 0.4, "hue_jitter": 30.0}},
        "objective": {"scale": 16.0, "margin": 0.3},
        "head": {"sample_rate": 1.0, "init_std": 0.1},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.2, "warmup_steps": 2, "clip_norm": 1.0, "head_clip_norm": 0.1},
        "train": {"steps": 8, "global_batch": 24, "precision": "fp32", "seed": 1, "log_every": 1}
        | {"drop_path": 0.2, "token_drop": 0.25}
        | {"checkpoint_every": 8, "keep_checkpoints": 3},
    }


def launcher(name: str, num_ranks: int) -> list[str]:
    """The command before the program's own arguments. Every launcher is given a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    if name == "python":
        return [sys.executable, "-m", "mlcd_ds", "train"]
    if name == "torchrun":
        run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_ranks)]
        return [*run, "--master_addr", "127.0.0.1", "--master_port", port, "-m", "mlcd_ds", "train"]
    run = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(num_ranks)]
    return [*run, "--master_port", port, str(ROOT / "mlcd_ds/train.py")]


@dataclass
class Training:
    """A training in a child process; its output goes to a file."""

    process: subprocess.Popen[bytes]
    output: Path
    out: Path

    def wait(self) -> int:
        """The exit status."""
        try:
            return self.process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {TIMEOUT_S} s:\n{self.text}") from None

    @property
    def text(self) -> str:
        return self.output.read_text()

    def signal_all(self, number: int) -> None:
        """To the launcher and all processes below it, by their ids: the launcher first, so that it starts no more."""
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def kill(self) -> None:
        """SIGKILL for all of them, at one moment as far as they can tell."""
        self.signal_all(signal.SIGSTOP)
        self.signal_all(signal.SIGKILL)
        self.process.wait()

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for it, watching that the training still runs."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert self.process.poll() is None, f"ended before that moment:\n{self.text}"
            assert time.monotonic() < deadline, f"that moment never came:\n{self.text}"
            time.sleep(POLL_S)

    def until_step(self, step: int) -> None:
        self.until(lambda: len(metrics(self.out)) >= step)

    def kill_inside_a_save(self) -> None:
        """Stop it while a half-written checkpoint is there, make sure that it is, and kill it."""
        while True:
            self.until(lambda: any((self.out / "checkpoints").glob(".step_*.partial")))
            self.signal_all(signal.SIGSTOP)
            if any((self.out / "checkpoints").glob(".step_*.partial")):
                return self.kill()
            self.signal_all(signal.SIGCONT)


def descendants(pid: int) -> list[int]:
    """Ids of the processes below one, from /proc."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        children.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    found, queue = [], [pid]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def start(
    recipe: Path,
    out: Path,
    *overrides: str,
    run: tuple[str, int] = ("python", 1),
    env: dict[str, str],
    ds_config: Path = DS_CONFIG,
) -> Training:
    """Start a training into `out`; `run` is launcher and number of ranks."""
    output = out.with_name(f"{out.name}.{time.monotonic_ns()}.txt")
    arguments = ["--recipe", str(recipe), "--deepspeed_config", str(ds_config), f"train.out={out}", *overrides]
    with open(output, "wb") as file:
        process = subprocess.Popen(
            [*launcher(*run), *arguments], stdout=file, stderr=subprocess.STDOUT, env=env, cwd=out.parent
        )
    return Training(process, output, out)


def write_recipe(path: Path, index: Path, labels: Path) -> Path:
    path.write_text(yaml.safe_dump(tiny_recipe(index, labels)))
    return path


def metrics(out: Path) -> list[dict[str, float]]:
    """Whole entries of a run's log so far."""
    path = out / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def curves(out: Path) -> Tensor:
    """fp64 [steps, 5]: loss, its terms, both gradient norms."""
    entries = metrics(out)
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
    return torch.tensor([[entry[name] for name in COLUMNS] for entry in entries], dtype=torch.float64)


def checkpoints(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step_*"))


def final_weights(out: Path) -> dict[str, Tensor]:
    """Backbone and all centres of the newest checkpoint."""
    newest = checkpoints(out)[-1]
    shards = [load_file(path) for path in sorted(newest.glob("head-*.safetensors"))]
    head = {f"head.{name}": torch.cat([shard[name] for shard in shards]) for name in ("weight", "exp_avg")}
    return {**load_file(newest / "backbone.safetensors"), **head}


def final_bytes(out: Path) -> dict[str, bytes]:
    """Content of the newest checkpoint's weight files."""
    newest = checkpoints(out)[-1]
    return {f"{newest.name}/{path.name}": path.read_bytes() for path in sorted(newest.glob("*.safetensors"))}


def assert_same_end(got: Path, expected: Path) -> None:
    """Logged curves and the newest checkpoint's weight files are equal, bit for bit."""
    assert torch.equal(curves(got), curves(expected)), "logged losses"
    got_files, expected_files = final_bytes(got), final_bytes(expected)
    assert got_files.keys() == expected_files.keys()
    for name, content in expected_files.items():
        assert got_files[name] == content, name
