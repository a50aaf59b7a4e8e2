"""CLIP's loss by blocks beside open_clip's form of it, and the MLCD step before and after objectives became parts.

python benchmarks/two_towers.py [--json FILE] [--only loss step] [--before COMMIT]

loss   B = 4,096, E = 512, fp32, one process: loss, embeddings' and scale's gradients, by ours and by the formula of
       open_clip's ClipLoss (both logits [B, B] under autograd; written here, on one rank its gathers do nothing).
       Times are taken in turn, the ratio is the median of rounds; memory is the peak of a process of its own above
       its embeddings.
step   whole trainings of the demo's recipe on one shard by this tree and by the one of COMMIT, in turn: the median
       of a step's time but for waiting for data, and of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from head import peak_memory
from torch import Tensor

from mlcd_ds.artefacts.manifest import library_versions
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.engine.checkpoint import git_commit
from mlcd_ds.kernels.matmul import Matmul
from mlcd_ds.objectives.clip import clip_loss
from mlcd_ds.objectives.pairs import Pairs

ROOT = Path(__file__).resolve().parents[1]
BEFORE = "ab08c82"  # the last tree whose trainer named the head
BATCH, DIM, SCALE = 4096, 512, 50.0
ROUNDS, STEP_ROUNDS, STEPS, WARM = 7, 5, 60, 10


def embeddings() -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows that are partly like their partners, and a scale."""
    generator = torch.Generator().manual_seed(0)
    image_BE, noise_BE = (torch.randn(BATCH, DIM, generator=generator) for _ in range(2))
    return F.normalize(image_BE), F.normalize(image_BE + 2 * noise_BE), torch.tensor(SCALE)


def ours(image_BE: Tensor, text_BE: Tensor, scale: Tensor) -> Tensor:
    pairs = Pairs(image_BE, text_BE, scale, Group(dist.group.WORLD), Matmul(False, "cpu"))
    return clip_loss(pairs)[1]["image"]


def open_clips(image_BE: Tensor, text_BE: Tensor, scale: Tensor) -> Tensor:
    """The formula of its ClipLoss."""
    image_BE, text_BE, scale = (tensor.detach().requires_grad_() for tensor in (image_BE, text_BE, scale))
    own_B = torch.arange(len(image_BE))
    by_image, by_text = scale * image_BE @ text_BE.T, scale * text_BE @ image_BE.T
    loss = (F.cross_entropy(by_image, own_B) + F.cross_entropy(by_text, own_B)) / 2
    loss.backward()
    assert image_BE.grad is not None
    return image_BE.grad


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"ours": ours, "open_clip": open_clips}


def child(name: str) -> None:
    """In a process of its own: the peak of one form, or the times of both."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    given, result = embeddings(), {}
    if name == "times":
        grads = {form: call(*given) for form, call in FORMS.items()}
        result["difference"] = float((grads["ours"] - grads["open_clip"]).norm() / grads["open_clip"].norm())
        times: dict[str, list[float]] = {form: [] for form in FORMS}
        for _ in range(ROUNDS):
            for form, call in FORMS.items():
                begin = time.perf_counter()
                call(*given)
                times[form].append(time.perf_counter() - begin)
        result |= {f"{form}_s": statistics.median(values) for form, values in times.items()}
        ratios = [mine / theirs for mine, theirs in zip(times["ours"], times["open_clip"], strict=True)]
        result["ratio"] = statistics.median(ratios)
    else:
        FORMS[name](*(tensor[:64] if tensor.ndim else tensor for tensor in given))  # libraries take theirs once
        with peak_memory(result):
            FORMS[name](*given)
    sys.stdout.write(json.dumps(result) + "\n")


def measure_loss() -> dict[str, float]:
    """Both forms' times and peaks, and their ratios."""

    def ask(name: str) -> dict[str, float]:
        command = [sys.executable, __file__, "--child", name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment(ROOT))
        return json.loads(done.stdout.splitlines()[-1])

    times, peaks = ask("times"), {form: ask(form)["peak_mib"] for form in FORMS}
    return {
        "loss_memory_ratio_vs_open_clip": peaks["ours"] / peaks["open_clip"],
        "loss_time_ratio_vs_open_clip": times.pop("ratio"),
        **{f"loss_peak_mib_{form}": peak for form, peak in peaks.items()},
        **{f"loss_{name}": value for name, value in times.items()},
    }


def environment(tree: Path) -> dict[str, str]:
    """One thread, and the package of a tree."""
    return {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def stage(tree: Path, *words: object) -> None:
    """Run a command of a tree's package."""
    command = [sys.executable, "-m", "mlcd_ds", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment(tree), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command}: {done.stderr}")


def step_seconds(tree: Path, folder: Path, out: Path) -> float:
    """The median of a training's steps, but for waiting for data."""
    keys = [f"data.index={folder / 'index'}", f"data.labels={folder / 'labels'}", "data.clusters=null"]
    keys += ["head.init=normal", "train.log_every=1", f"train.steps={STEPS}", "optimizer.warmup_steps=2"]
    keys += ["train.precision=fp32", f"train.out={out}"]
    stage(tree, "train", "--deepspeed_config", ROOT / "ds_configs/zero1_fp32_cpu.json", *keys)
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(entry["time/step_s"] - entry["time/data_s"] for entry in entries[WARM:])


def measure_step(before: str) -> dict[str, float | str]:
    """Both trees' steps, in turn."""
    with tempfile.TemporaryDirectory() as name:
        folder, old = Path(name), Path(name) / "before"
        old.mkdir()
        archive = subprocess.run(["git", "archive", before], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
        subprocess.run(["tar", "-x", "-C", str(old)], input=archive, check=True)
        shard = ROOT / "demo/shards/train/00000.tar"
        index, embeddings_, clusters = (folder / name for name in ("index", "embeddings", "clusters"))
        stage(ROOT, "index", "--shards", shard, "--out", index)
        stage(ROOT, "embed", "--index", index, "--encoder", "pixels@8", "--out", embeddings_)
        stage(ROOT, "cluster", "--embeddings", embeddings_, "--num-centers", 64, "--out", clusters)
        stage(ROOT, "assign", "--embeddings", embeddings_, "--clusters", clusters, "--out", folder / "labels")
        pairs = []
        for number in range(STEP_ROUNDS):
            trees = ((old, "before"), (ROOT, "after"))
            found = {which: step_seconds(tree, folder, folder / f"{which}{number}") for tree, which in trees}
            pairs.append(found)
            sys.stdout.write(f"{json.dumps(found)}\n")
            sys.stdout.flush()
    return {
        "mlcd_step_ratio_before_after": statistics.median(pair["after"] / pair["before"] for pair in pairs),
        "mlcd_step_ratio_lowest": min(pair["after"] / pair["before"] for pair in pairs),
        "mlcd_step_ratio_highest": max(pair["after"] / pair["before"] for pair in pairs),
        "mlcd_step_s_before": statistics.median(pair["before"] for pair in pairs),
        "mlcd_step_s_after": statistics.median(pair["after"] for pair in pairs),
        "mlcd_step_before": before,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--only", nargs="+", choices=("loss", "step"), default=("loss", "step"))
    parser.add_argument("--before", default=BEFORE, metavar="COMMIT", help="default: %(default)s")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child)
    result: dict[str, object] = {}
    if "loss" in arguments.only:
        result |= measure_loss()
    if "step" in arguments.only:
        result |= measure_step(arguments.before)
    result |= {"commit": git_commit(), "versions": library_versions()}
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
