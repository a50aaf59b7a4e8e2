"""All systems side by side on the pictures in demo/shards; `make compare` runs this.

Each system tries the same learning rates, trained on two thirds of the training pictures and judged on the rest; with
the best it trains on all of them, several times, and is judged once on the test pictures. Then MLCD's own settings, one
at a time. Every run leaves a file in docs/comparison/runs, and is not made again while that is there: stop and start as
you like. --page draws the plots and writes the tables of docs/comparison.md from the files.

  make compare COMPARE_ARGS="--only clip,nclip --ablations m --jobs 1"
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from compare_page import write_page
from compare_systems import (
    ABLATIONS,
    LEARNING_RATES,
    NUM_CENTERS,
    SEEDS,
    STORED_LABELS,
    SYSTEMS,
    System,
)
from run import ROOT, TEACHER, ds_config
from tqdm import tqdm

from mlcd_ds.artefacts.files import write_json
from mlcd_ds.artefacts.manifest import library_versions
from mlcd_ds.engine.checkpoint import git_commit

RECORDS = Path("docs/comparison/runs")
TRAIN, TEST = ROOT / "demo/shards/train", ROOT / "demo/shards/test"
STARTS = [SYSTEMS[system.starts_from] for system in SYSTEMS.values() if system.starts_from]
NUM_FOR_TUNING = 8  # of the 12 training shards; on the others learning rates are judged
SCORES = ("knn", "linear_probe")
TEXT_SCORES = {"zeroshot": "acc1", "image -> text R@10": "text_retrieval_recall@10"}
TEXT_SCORES |= {"text -> image R@10": "image_retrieval_recall@10"}


@dataclass(frozen=True)
class Run:
    """One training and its evaluation."""

    name: str  # of its file and folder
    system: System
    lr: float
    seed: int = 0
    is_tuning: bool = False
    num_centers: int = NUM_CENTERS
    start: Run | None = None  # what its image tower comes from


class Comparison:
    """Folders below `out`, scores in `records`; at most `jobs` runs at a time, each in one process of one thread."""

    def __init__(self, out: Path, records: Path, jobs: int, overrides: list[str]) -> None:
        self.out, self.records, self.jobs, self.overrides = out, records, jobs, overrides

    def record(self, run: Run) -> Path:
        """Where a run's scores are kept."""
        return self.records / f"{run.name}.json"

    def command(self, log: Path, *words: object) -> None:
        """Run a stage. Its output goes to a file, whose end is shown where it fails."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.write(f"$ {' '.join(map(str, words))}\n")
            file.flush()
            command = [sys.executable, "-m", "mlcd_ds", *map(str, words)]
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file, check=False)
        if done.returncode:
            raise SystemExit(f"{log}:\n{log.read_text()[-3000:]}")

    def prepare(self) -> None:
        """Indexes, the tokenizer, the teacher's embeddings, clusters and labels: for tuning, and for all pictures."""
        shards = sorted(TRAIN.glob("*.tar"))
        parts = {"tuning": shards[:NUM_FOR_TUNING], "held": shards[NUM_FOR_TUNING:], "all": shards}
        parts["test"] = sorted(TEST.glob("*.tar"))
        for part, files in parts.items():
            self.command(self.log("prepare"), "index", "--shards", *files, "--out", self.folder(part, "index"))
        for part in ("tuning", "all"):
            index, embeddings = self.folder(part, "index"), self.folder(part, "embeddings")
            stage = partial(self.command, self.log("prepare"))
            stage("tokenizer", "--index", index, "--out", self.folder(part, "tokenizer"))
            stage("embed", "--index", index, "--encoder", TEACHER, "--out", embeddings)
            for count in ABLATIONS["k"].values if part == "all" else (NUM_CENTERS,):
                clusters = self.folder(part, f"clusters-{count:.0f}")
                stage("cluster", "--embeddings", embeddings, "--num-centers", f"{count:.0f}", "--out", clusters)
                given = ("--embeddings", embeddings, "--clusters", clusters, "--index", index)
                labels = self.folder(part, f"labels-{count:.0f}")
                stage("assign", *given, "--num-labels", STORED_LABELS, "--out", labels)

    def folder(self, part: str, name: str) -> Path:
        """Of what is made of some pictures."""
        return self.out / part / name

    def keys(self, run: Run) -> list[str]:
        """What a run changes in compare.yaml."""
        return [*run.system.keys, *self.overrides]

    def log(self, name: str) -> Path:
        return self.out / "logs" / f"{name}.log"

    def make(self, run: Run) -> None:
        """Train and judge, unless its record is there."""
        if self.record(run).exists():
            return
        trained = self.train(run)
        judged = "held" if run.is_tuning else "test"
        self.command(
            *(self.log(run.name), "evaluate", "--model", trained, "--out", self.out / "evaluation" / run.name),
            *("--train-index", self.folder(_pictures(run), "index"), "--test-index", self.folder(judged, "index")),
            *("--classes", "demo/shards/classes.json", "--templates", "demo/templates.txt", "--num-threads", 1),
            *("--protocols", "knn", "probe", *(("zeroshot", "retrieval") if run.system.has_text else ())),
            # One validation split a run, drawn anew for each seed: what it adds to the error is in the spread of seeds.
            *("--num-splits", 1, "--seed", run.seed),
        )
        report = json.loads((self.out / "evaluation" / run.name / "report.json").read_text())
        scores = {name: report[name] for name in SCORES}
        if run.system.has_text:
            found = report["zeroshot"] | report["retrieval"]
            scores |= {name: found[key] for name, key in TEXT_SCORES.items()}
        metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
        record = {"run": run.name, "lr": run.lr, "seed": run.seed, "judged_on": judged, "scores": scores}
        record |= {"keys": self.keys(run), "final_loss": metrics[-1]["loss/total"]}
        write_json(self.record(run), record | {"commit": git_commit(), "versions": library_versions()})
        if run.system not in STARTS:
            shutil.rmtree(trained / "checkpoints")

    def train(self, run: Run) -> Path:
        """The run's folder."""
        folder, pictures = self.out / "runs" / run.name, _pictures(run)
        if (folder / "manifest.json").exists():
            return folder
        keys = [f"data.index={self.folder(pictures, 'index')}", f"train.out={folder}", f"train.seed={run.seed}"]
        keys += [f"optimizer.lr={run.lr}", f"data.tokenizer={self.folder(pictures, 'tokenizer')}"]
        labels, clusters = (self.folder(pictures, f"{name}-{run.num_centers:.0f}") for name in ("labels", "clusters"))
        keys += (
            [f"data.labels={labels}", f"data.clusters={clusters}"] if run.system.is_labelled else ["data.labels=null"]
        )
        if run.start:
            keys.append(f"train.init_from={self.train(run.start)}")
        config = ("--deepspeed_config", f"ds_configs/{ds_config()}", "--recipe", "demo/compare.yaml")
        self.command(self.log(run.name), "train", *config, *keys, *run.system.keys, *self.overrides)
        return folder

    def all_of(self, runs: Iterable[Run], what: str) -> None:
        """Make runs, some at a time. Records of other settings end the comparison."""
        runs = list(runs)
        for run in runs:
            if self.record(run).exists():
                kept = json.loads(self.record(run).read_text())
                if (kept["keys"], kept["lr"]) != (self.keys(run), run.lr):
                    raise SystemExit(
                        f"{self.record(run)} is of a run with other settings: remove it, or name --records."
                    )
        missing = [run for run in runs if not self.record(run).exists()]
        for start in {run.start.name: run.start for run in missing if run.start}.values():
            self.train(start)
        with ThreadPoolExecutor(self.jobs) as pool:
            bar = tqdm(pool.map(self.make, missing), total=len(missing), desc=what, disable=not sys.stderr.isatty())
            for _ in bar:
                pass

    def best_rate(self, name: str) -> float:
        """The learning rate whose try scored best on the training pictures left out: the mean of kNN and linear probe;
        of text towers beside a frozen image tower, zero-shot."""

        def score(lr: float) -> float:
            scores = json.loads(self.record(tuning_run(name, lr)).read_text())["scores"]
            return scores["zeroshot"] if SYSTEMS[name].starts_from else sum(scores[key] for key in SCORES)

        return max(LEARNING_RATES, key=score)

    def final_run(self, name: str, seed: int) -> Run:
        """With the best learning rate, on all training pictures."""
        source = SYSTEMS[name].starts_from
        start = self.final_run(source, seed) if source else None
        return Run(f"{name}-seed{seed}", SYSTEMS[name], self.best_rate(name), seed, start=start)

    def ablation_runs(self, key: str) -> list[Run]:
        """MLCD with each value; where that is the usual one, the comparison's own runs."""
        ablation, lr, found = ABLATIONS[key], self.best_rate("mlcd"), []
        for value in ablation.values:
            count = int(value) if key == "k" else NUM_CENTERS
            for seed in SEEDS:
                name = f"mlcd-seed{seed}" if value == ablation.default else f"mlcd-{key}{value:g}-seed{seed}"
                found.append(Run(name, ablation.system(value), lr, seed, num_centers=count))
        return found


def _pictures(run: Run) -> str:
    return "tuning" if run.is_tuning else "all"


def tuning_run(name: str, lr: float, start: Run | None = None) -> Run:
    """A try of a learning rate."""
    return Run(f"tuning-{name}-lr{lr:g}", SYSTEMS[name], lr, is_tuning=True, start=start)


def names_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """A reader of names from a list with commas."""

    def read(given: str) -> list[str]:
        names = [name for name in given.split(",") if name]
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(known)}")
        return names

    return read


def main() -> None:
    """Parse, make what is missing, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder of all runs (%(default)s)")
    parser.add_argument("--only", type=names_of(SYSTEMS), default=list(SYSTEMS), help="systems, as clip,nclip")
    parser.add_argument(
        "--ablations", type=names_of(ABLATIONS), default=list(ABLATIONS), help=f"of {','.join(ABLATIONS)}; '': none"
    )
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)), help="runs at a time (%(default)s)")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the scores (%(default)s)")
    parser.add_argument("--page", action="store_true", help="make no run: plots and tables from what there is")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="recipe keys for all, such as train.steps=100"
    )
    arguments = parser.parse_args()
    if not arguments.page:
        comparison = Comparison(arguments.out, ROOT / arguments.records, arguments.jobs, arguments.overrides)
        compare(comparison, arguments.only, arguments.ablations)
    write_page(ROOT / arguments.records)


def compare(comparison: Comparison, names: list[str], ablations: list[str]) -> None:
    """All runs: each step needs the records of the one before."""
    comparison.prepare()
    first = [name for name in names if not SYSTEMS[name].starts_from]
    then = [name for name in names if SYSTEMS[name].starts_from]
    needed = {source for name in then if (source := SYSTEMS[name].starts_from)} | ({"mlcd"} if ablations else set())
    first += sorted(needed - set(first))
    comparison.all_of([tuning_run(name, lr) for name in first for lr in LEARNING_RATES], "learning rates")
    starts = {
        name: tuning_run(source, comparison.best_rate(source)) for name in then if (source := SYSTEMS[name].starts_from)
    }
    comparison.all_of([tuning_run(name, lr, starts[name]) for name in then for lr in LEARNING_RATES], "learning rates")
    comparison.all_of([comparison.final_run(name, seed) for name in first for seed in SEEDS], "systems")
    comparison.all_of([comparison.final_run(name, seed) for name in then for seed in SEEDS], "systems")
    comparison.all_of([run for key in ablations for run in comparison.ablation_runs(key)], "ablations")


if __name__ == "__main__":
    main()
