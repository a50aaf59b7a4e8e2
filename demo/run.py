"""The whole pipeline on the pictures in demo/shards, through its own command lines; `make demo` runs this.

index -> embed -> cluster -> assign -> train -> export -> evaluate, then one table: kNN and linear probe of raw pixels,
the untrained backbone, the trained one, and the teacher whose embeddings were clustered. What is done already is not
done again. `--steps` shortens the training.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from mlcd_ds.artefacts.files import write_json
from mlcd_ds.evaluation.plots import comparison_plot
from mlcd_ds.kernels.device import has_bf16

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TEACHER = "efficientnet-lite0@128"
NUM_CENTERS = 256


def run(*command: object, **environment: str) -> None:
    """Run one command line in the repository, showing it; a failure ends the demo with its status."""
    words = [str(word) for word in command]
    sys.stdout.write(f"\n$ {' '.join(words)}\n")
    sys.stdout.flush()
    status = subprocess.run(words, cwd=ROOT, env={**os.environ, **environment}, check=False).returncode
    if status:
        sys.exit(status)


def stage(name: str, *arguments: object) -> None:
    """Run one stage as a module, by this very Python."""
    run(sys.executable, "-m", "mlcd_ds", name, *arguments)


def pipeline(out: Path, overrides: list[str]) -> dict[str, dict]:
    """All stages; returns the report of each evaluated encoder."""
    for split in ("train", "test"):
        stage("index", "--shards", f"demo/shards/{split}/*.tar", "--out", out / "index" / split)
    train_index, test_index = out / "index" / "train", out / "index" / "test"
    stage("embed", "--index", train_index, "--encoder", TEACHER, "--out", out / "embeddings")
    stage("cluster", "--embeddings", out / "embeddings", "--num-centers", NUM_CENTERS, "--out", out / "clusters")
    clustered = ("--embeddings", out / "embeddings", "--clusters", out / "clusters", "--index", train_index)
    stage("assign", *clustered, "--out", out / "labels")
    train(out, overrides)
    stage("export", "--run", out / "train", "--out", out / "export")
    encoders = {"pixels": "pixels", "untrained": "recipe:demo", "trained": out / "export", "teacher": TEACHER}
    reports = {}
    for name, encoder in encoders.items():
        folder = out / "evaluation" / name
        indexes = ("--train-index", train_index, "--test-index", test_index)
        stage("evaluate", "--model", encoder, *indexes, "--classes", "demo/shards/classes.json", "--out", folder)
        reports[name] = json.loads((ROOT / folder / "report.json").read_text())
    return reports


def ds_config() -> str:
    """bf16 where the machine multiplies it faster than fp32, fp32 elsewhere."""
    if torch.cuda.is_available():
        return "zero1_bf16.json" if has_bf16(torch.device("cuda", 0)) else "zero1_fp16.json"
    cpu = Path("/proc/cpuinfo")
    is_fast = cpu.exists() and re.search(r"\b(amx_bf16|avx512_bf16)\b", cpu.read_text())
    return "zero1_bf16_cpu.json" if is_fast else "zero1_fp32_cpu.json"


def train(out: Path, overrides: list[str]) -> None:
    """Train the backbone."""
    folders = {"data.index": "index/train", "data.labels": "labels", "data.clusters": "clusters", "train.out": "train"}
    launch_training("demo", [*(f"{key}={out / folder}" for key, folder in folders.items()), *overrides])


def launch_training(recipe: str, overrides: list[str]) -> None:
    """Train with the deepspeed launcher, on at most two ranks: one a GPU, or one a core where there is none."""
    num_ranks = min(2, torch.cuda.device_count() or os.cpu_count() or 1)
    launcher = Path(sys.executable).with_name("deepspeed")
    run(
        *(launcher, "--num_accelerators", num_ranks, "mlcd_ds/train.py"),
        *("--deepspeed_config", f"ds_configs/{ds_config()}", "--recipe", recipe),
        *overrides,
        OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 1) // num_ranks)),
        DS_ACCELERATOR="cuda" if torch.cuda.is_available() else "cpu",  # DeepSpeed would guess the same, and warn
    )


def show(out: Path, reports: dict[str, dict], minutes: float) -> None:
    """Write report.json and the plot, print the table and where things lie."""
    scores = {name: {"knn": r["knn"], "linear_probe": r["linear_probe"]} for name, r in reports.items()}
    write_json(ROOT / out / "report.json", scores)
    rows = {name: {**scores[name], "linear_probe_se": report["linear_probe_se"]} for name, report in reports.items()}
    classes = json.loads((HERE / "shards" / "classes.json").read_text())
    comparison_plot(rows, ROOT / out / "report.png", chance=1 / len(classes))
    lines = [f"\n{'features':12}{'kNN':>8}{'linear probe':>22}", "-" * 42]
    for name, report in reports.items():
        probe = f"{100 * report['linear_probe']:.1f} +- {100 * report['linear_probe_se']:.1f}"
        note = "" if report["converged"] else "  (not converged)"
        lines.append(f"{name:12}{100 * report['knn']:>8.1f}{probe:>22}{note}")
    test = next(iter(reports.values()))
    lines += [
        f"top-1 in %, {len(classes)} classes, {test['num_train']} labelled images to learn from, "
        f"{test['num_test']} held out; {minutes:.1f} minutes",
        f"linear probe: mean of {len(test['linear_probe_by_split'])} validation splits +- one standard error, of test "
        "images and splits",
        f"\nreport      {out / 'report.json'}, plot {out / 'report.png'}",
        f"clusters    {out / 'labels/report.html'}: sizes, pictures, agreement with the classes",
        f"confusions  {out / 'evaluation'}/*/confusion.png",
        f"backbone    {out / 'export'} (transformers.CLIPVisionModel.from_pretrained)",
        f"TensorBoard .venv/bin/tensorboard --logdir {out / 'train'}, then open the address that it prints",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def main() -> None:
    """Parse, run, show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder of all results (default: %(default)s)"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="recipe keys, such as train.steps=100")
    arguments = parser.parse_args()
    began = time.monotonic()
    reports = pipeline(arguments.out, arguments.overrides)
    show(arguments.out, reports, (time.monotonic() - began) / 60)


if __name__ == "__main__":
    main()
