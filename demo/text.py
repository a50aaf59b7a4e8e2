"""Text on the pictures in demo/shards, after `make demo`; `make demo-text` runs this.

A tokenizer learned from the captions; CLIP from scratch; and LiT: a text tower for the demo's own backbone, which stays
as it is. Then one table: zero-shot classification, retrieval both ways, and the linear probe of the image tower. What
is done already is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from run import ROOT, launch_training, stage

from mlcd_ds.artefacts.files import write_json

RUNS = {"clip": "demo_clip", "lit": "demo_lit"}
TITLES = {"clip": "CLIP from scratch", "lit": "MLCD + LiT"}
RECALLS = [f"{way}_retrieval_recall@{k}" for way in ("text", "image") for k in (1, 5, 10)]


def pipeline(out: Path, demo: Path, overrides: list[str]) -> dict[str, dict]:
    """Tokenizer, trainings, evaluations, exports; returns the reports."""
    train_index, test_index = demo / "index" / "train", demo / "index" / "test"
    stage("tokenizer", "--index", train_index, "--out", out / "tokenizer")
    reports = {}
    for name, recipe in RUNS.items():
        keys = {"data.index": train_index, "data.tokenizer": out / "tokenizer", "train.out": out / name}
        keys |= {"train.init_from": demo / "train"} if name == "lit" else {}
        launch_training(recipe, [f"{key}={value}" for key, value in keys.items()] + overrides)
        folder = out / "evaluation" / name
        stage(
            *("evaluate", "--model", out / name, "--protocols", "knn", "probe", "zeroshot", "retrieval"),
            *("--train-index", train_index, "--test-index", test_index),
            *("--classes", "demo/shards/classes.json", "--templates", "demo/templates.txt", "--out", folder),
        )
        card = ("--report", folder / "report.json")
        stage("export", "--run", out / name, *card, "--out", out / "export" / name)
        reports[name] = json.loads((ROOT / folder / "report.json").read_text())
    return reports


def show(out: Path, reports: dict[str, dict], minutes: float) -> None:
    """Write report.json, print the table and where things lie."""
    write_json(ROOT / out / "report.json", reports)
    names = "".join(f"{TITLES[name]:>20}" for name in reports)
    lines = [f"\n{'in %':34}{names}", "-" * (34 + 20 * len(reports))]

    def line(title: str, *keys: str) -> None:
        values = []
        for report in reports.values():
            value = report
            for key in keys:
                value = value[key]
            values.append(f"{100 * value:>20.1f}")
        lines.append(f"{title:34}{''.join(values)}")

    line("zero-shot top-1", "zeroshot", "acc1")
    line("zero-shot top-5", "zeroshot", "acc5")
    line("zero-shot, mean of classes", "zeroshot", "mean_per_class_recall")
    line("  chance", "zeroshot", "chance")
    line("  always the largest class", "zeroshot", "largest_class")
    for key in RECALLS:
        way, k = key.split("_")[0], key.split("@")[1]
        line(f"{'image -> text' if way == 'text' else 'text -> image'} R@{k}", "retrieval", key)
    line("linear probe of the image tower", "linear_probe")
    line("kNN of the image tower", "knn")
    test = next(iter(reports.values()))
    lines += [
        f"{test['zeroshot']['num_images']} held-out images; retrieval among {test['retrieval']['num_texts']} captions, "
        f"some of which occur more than once; {minutes:.1f} minutes",
        f"\nreport      {out / 'report.json'}",
        f"pages       {out / 'evaluation'}/*/report.html: confusions, best and worst classes, hits and misses",
        f"models      {out / 'export'}/*: README.md says how to load them",
        f"TensorBoard .venv/bin/tensorboard --logdir {out}, then open the address that it prints",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def main() -> None:
    """Parse, run, show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo-text"), help="folder of all results (%(default)s)")
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="folder of `make demo` (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="recipe keys, such as train.steps=100")
    arguments = parser.parse_args()
    if not (ROOT / arguments.demo / "train" / "manifest.json").exists():
        sys.exit(f"{arguments.demo} has no finished demo: run `make demo` first.")
    began = time.monotonic()
    reports = pipeline(arguments.out, arguments.demo, arguments.overrides)
    show(arguments.out, reports, (time.monotonic() - began) / 60)


if __name__ == "__main__":
    main()
