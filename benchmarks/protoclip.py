"""What the beginnings of ProtoCLIP's episodes cost.

python benchmarks/protoclip.py [--json FILE] [--only overhead clustering] [--samples N] [--batch N]
                               [--rows N] [--clusters K] [--rounds N]

overhead    the demo's recipe (demo_protoclip) on two ranks of one thread each, on demo/shards: seconds of the beginning
            of an episode over those of its steps, `episode_overhead`; and where they go: features (reading, decoding
            and embedding), clustering, and exchange, which is the time in collectives of the clustering, waiting
            included. Medians of rounds; a round is the beginning of an episode, and its steps.
clustering  rows in memory, as the heads give them (128 numbers): k-means with restarts on two ranks of one thread,
            beside rank 0 alone, as the public code does it: rows gathered there, labels and centres sent back.
            `clustering_speedup_2_ranks` is the median of rounds in turn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from head import launch
from report import report
from torch import Tensor
from two_towers import ROOT, stage

from mlcd_ds.clustering.memory_rows import Share, cluster_rows
from mlcd_ds.config import load_recipe
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.engine.engine_config import resolve_ds_config
from mlcd_ds.engine.layout import Layout, plan_batches
from mlcd_ds.engine.trainer import Trainer
from mlcd_ds.engine.training_data import open_training_data
from mlcd_ds.objectives.protoclip import ProtoClip

PARTS = ("overhead", "clustering")
NUM_RANKS, ROUNDS = 2, 5
EPISODE, CLUSTERS_PER_SAMPLE = 3584, 14  # the demo's
ROWS, CLUSTERS, DIM, ITERATIONS, RESTARTS = 20_000, 2_000, 128, 20, 3  # a tenth of the paper's


class TimedGroup(Group):
    """Adds up the seconds that this rank spends in collectives of k-means and of what follows it."""

    seconds: ClassVar[list[float]] = [0.0]

    def all_gather(self, rows_B: Tensor) -> Tensor:
        begin = time.perf_counter()
        found = super().all_gather(rows_B)
        self.seconds[0] += time.perf_counter() - begin
        return found

    def reduce_scatter_sum(self, rows_G: Tensor) -> Tensor:
        begin = time.perf_counter()
        found = super().reduce_scatter_sum(rows_G)
        self.seconds[0] += time.perf_counter() - begin
        return found

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        begin = time.perf_counter()
        found = super().all_reduce_sum(values)
        self.seconds[0] += time.perf_counter() - begin
        return found


def make_trainer(group: Group, folder: Path, samples: int, batch: int, num_episodes: int) -> Trainer:
    """The demo's, on this rank."""
    os.environ.update(RANK=str(group.rank), WORLD_SIZE=str(group.size), LOCAL_RANK=str(group.rank))
    keys = [f"data.index={folder / 'index'}", f"data.tokenizer={folder / 'tokenizer'}", f"train.out={folder / 'run'}"]
    keys += [f"objective.episode_samples={samples}", f"objective.num_clusters={max(2, samples // CLUSTERS_PER_SAMPLE)}"]
    keys += [f"train.steps={samples // batch * num_episodes}", f"train.global_batch={batch}", "train.precision=fp32"]
    tokenizer = json.loads((folder / "tokenizer" / "manifest.json").read_text())
    keys += [f"text.vocab_size={tokenizer['vocab_size']}", "optimizer.warmup_steps=1"]
    recipe, layout = load_recipe("demo_protoclip", tuple(keys)), Layout(group.size, 1, 1)
    ds_config = resolve_ds_config({}, Path("benchmark"), recipe, layout, plan_batches(recipe, layout, group.rank))
    return Trainer(recipe, ds_config, layout, open_training_data(recipe), group, torch.device("cpu"))


def episodes(group: Group, folder: Path, samples: int, batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, by what they go to."""
    trainer = make_trainer(group, folder, samples, batch, rounds + 4)  # one before and two behind, one not counted
    objective = trainer.objective
    assert isinstance(objective, ProtoClip)
    steps, batches = objective.plan.steps, trainer.batches(0)
    timed = TimedGroup(group.process_group)
    clusterer = type(objective.clusterer)(**{**vars(objective.clusterer), "group": timed})
    found: dict[str, list[float]] = {name: [] for name in ("features", "clustering", "exchange", "steps")}
    for step in range(steps):
        trainer.step(step, batches)
    for number in range(1, rounds + 2):
        group.barrier()
        moments = [time.perf_counter()]
        features = objective.features(number, trainer.embed, trainer.own_outputs)
        group.barrier()
        moments.append(time.perf_counter())
        timed.seconds[0] = 0.0
        objective.episode = clusterer.make(number, objective.reader.ids(number), features, None)
        group.barrier()
        moments.append(time.perf_counter())
        for step in range(number * steps, (number + 1) * steps):
            trainer.step(step, batches)
        group.barrier()
        moments.append(time.perf_counter())
        seconds = [end - begin for begin, end in itertools.pairwise(moments)]
        if number > 1:  # the first builds what later ones have
            values = (seconds[0], seconds[1] - timed.seconds[0], timed.seconds[0], seconds[2])
            for name, value in zip(found, values, strict=True):
                found[name].append(value)
    batches.close()
    return found


def measure_overhead(samples: int, batch: int, rounds: int) -> dict[str, float]:
    """On demo/shards' training pictures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = sorted(str(path) for path in (ROOT / "demo/shards/train").glob("*.tar"))
        stage(ROOT, "index", "--shards", *shards, "--out", folder / "index")
        stage(ROOT, "tokenizer", "--index", folder / "index", "--out", folder / "tokenizer")
        found = launch(episodes, folder, samples, batch, rounds, num_ranks=NUM_RANKS)
    medians = {name: statistics.median(values) for name, values in found.items()}
    ratios = [(f + c + x) / s for f, c, x, s in zip(*found.values(), strict=True)]
    return {
        "episode_overhead": statistics.median(ratios),
        "episode_overhead_lowest": min(ratios),
        "episode_overhead_highest": max(ratios),
        **{f"episode_{name}_over_steps": medians[name] / medians["steps"] for name in found if name != "steps"},
        **{f"episode_{name}_s": value for name, value in medians.items()},
        "episode_samples": samples,
        "episode_batch": batch,
    }


def clusterings(group: Group, num_rows: int, num_clusters: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of both ways, in turn."""
    alone = Group(next(made for made in [dist.new_group([rank]) for rank in range(group.size)] if is_member(made)))
    generator = torch.Generator().manual_seed(0)
    middles = torch.randn(num_clusters // 2, DIM, generator=generator)
    chosen = torch.randint(len(middles), (num_rows,), generator=generator)
    all_rows = F.normalize(middles[chosen] + 0.7 * torch.randn(num_rows, DIM, generator=generator))
    share, seeds = Share.of(num_rows, group), list(range(RESTARTS))
    mine = all_rows[share.first : share.first + share.count].clone()
    del all_rows

    def on_all() -> float:
        best, own_N = cluster_rows(mine, share, group, num_clusters, ITERATIONS, seeds)
        share.gather(own_N, group)
        return best.objective[-1]

    def on_one() -> float:
        gathered = share.gather(mine, group)
        labels_N = torch.zeros(num_rows, dtype=torch.int64)
        centers_CE, reached = torch.zeros(num_clusters, DIM), torch.zeros(1)
        if group.is_main:
            whole = Share.of(num_rows, alone)
            best, labels_N = cluster_rows(gathered, whole, alone, num_clusters, ITERATIONS, seeds)
            centers_CE, reached = best.centers_CE, torch.tensor([best.objective[-1]])
        for tensor in (labels_N, centers_CE, reached):
            group.all_reduce_sum(tensor.clone())
        return float(reached)

    found: dict[str, list[float]] = {"all": [], "one": [], "distance": []}
    for number in range(rounds + 1):
        for name, form in (("all", on_all), ("one", on_one)):
            group.barrier()
            begin = time.perf_counter()
            reached = form()
            group.barrier()
            if number:
                found[name].append(time.perf_counter() - begin)
                found["distance"].append(reached)
    return found


def is_member(process_group: object) -> bool:
    """Whether this rank is in a group that it has made."""
    return process_group is not dist.GroupMember.NON_GROUP_MEMBER


def measure_clustering(num_rows: int, num_clusters: int, rounds: int) -> dict[str, float]:
    """Both ways must end as good."""
    found = launch(clusterings, num_rows, num_clusters, rounds, num_ranks=NUM_RANKS)
    ratios = [one / both for one, both in zip(found["one"], found["all"], strict=True)]
    return {
        "clustering_speedup_2_ranks": statistics.median(ratios),
        "clustering_speedup_lowest": min(ratios),
        "clustering_speedup_highest": max(ratios),
        "clustering_s_2_ranks": statistics.median(found["all"]),
        "clustering_s_rank_0": statistics.median(found["one"]),
        "clustering_distance_lowest": min(found["distance"]),
        "clustering_distance_highest": max(found["distance"]),
        "clustering_rows": num_rows,
        "clustering_clusters": num_clusters,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--samples", type=int, default=EPISODE, help="of an episode (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=ROWS, help="to cluster (default: %(default)s)")
    parser.add_argument("--clusters", type=int, default=CLUSTERS, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the ranks
    result: dict[str, object] = {}
    if "overhead" in arguments.only:
        result |= measure_overhead(arguments.samples, arguments.batch, arguments.rounds)
    if "clustering" in arguments.only:
        result |= measure_clustering(arguments.rows, arguments.clusters, arguments.rounds)
    report(result, arguments.json)


if __name__ == "__main__":
    main()
