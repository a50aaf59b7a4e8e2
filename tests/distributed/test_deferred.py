"""All stages where collectives are only queued, as on GPUs, and a rank's files come as late as they can."""

from __future__ import annotations

import json
import os
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from deferred_group import DeferredGroup, OldBarrierGroup, SlowFiles, stream, told_of
from distributed_harness import run_ranks
from safetensors.torch import load_file
from shard_maker import encode, picture, write_tar

from mlcd_ds.distributed.collectives import Group
from mlcd_ds.distributed.stopping import StopRequest
from mlcd_ds.engine.weights import checkpoint_folders
from mlcd_ds.errors import UserError
from mlcd_ds.stages import assign, cluster, embed, evaluate, export, index, train
from mlcd_ds.stages.runner import Context

NUM_SHARDS, NUM_IMAGES = 3, 8  # of each split
STEPS, SAVED = 4, 2
RECIPE = {
    "description": "four steps of a tiny ViT",
    "model": dict(image_size=16, patch_size=8, width=32, depth=1, heads=2, mlp_width=64, embed_dim=16),
    "data": {"num_streams": 2, "shuffle_window": 8, "num_threads": 1},
    "objective": {"scale": 16.0},
    "head": {"sample_rate": 0.5, "init": "centers"},
    "optimizer": {"lr": 1e-3, "warmup_steps": 1},
    "train": {"steps": STEPS, "global_batch": 8, "precision": "fp32", "checkpoint_every": SAVED, "log_every": 1},
}


def make_shards(folder: Path) -> None:
    """Labelled pictures in two splits, and the recipe."""
    for part, split in enumerate(("train", "test")):
        for shard in range(NUM_SHARDS):
            members = []
            for number in range(NUM_IMAGES):
                image = encode(picture(1000 * part + 100 * shard + number))
                label = json.dumps({"label": number % 3}).encode()
                members += [(f"{number}.jpg", image), (f"{number}.json", label)]
            write_tar(folder / split / f"{shard}.tar", members)
    data = {"index": str(folder / "index-train"), "labels": str(folder / "assign"), "clusters": str(folder / "cluster")}
    content = RECIPE | {"data": RECIPE["data"] | data}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content))


def prepare(folder: Path, context: Context) -> None:
    """The stages before training."""
    for split in ("train", "test"):
        given = index.Options(shards=(str(folder / split / "*.tar"),), out=folder / f"index-{split}")
        index.run(given, context)
    embed_all(folder, context)
    options = cluster.Options(embeddings=folder / "embed", num_centers=6, num_iterations=3, out=folder / "cluster")
    with StopRequest() as stop:
        cluster.cluster(options, context, stop)
    assign.run(
        assign.Options(embeddings=folder / "embed", clusters=folder / "cluster", num_labels=2, out=folder / "assign"),
        context,
    )


def embed_all(folder: Path, context: Context) -> None:
    embed.run(embed.Options(index=folder / "index-train", encoder="pixels@4", out=folder / "embed"), context)


def train_all(folder: Path, context: Context) -> None:
    """Training, with its checkpoints, to the end or on from the newest of them."""
    os.environ.update(RANK=str(context.group.rank), WORLD_SIZE=str(context.group.size), LOCAL_RANK="0")
    given = Namespace(
        recipe=str(folder / "tiny.yaml"),
        overrides=[f"train.out={folder / 'run'}"],
        init_from=None,
        deepspeed_config=Path(__file__).parents[2] / "ds_configs/zero1_fp32_cpu.json",
        dry_run=False,
    )
    train.run(given, context)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint, with moments and head."""
    paths = sorted(checkpoint_folders(folder / "run")[-1].glob("*.safetensors"))
    return {f"{path.name} {name}": tensor for path in paths for name, tensor in load_file(path).items()}


def all_stages(folder: Path, group: DeferredGroup) -> None:
    """Every stage; resumed training ends in the same bits."""
    context = Context(group, torch.device("cpu"))
    prepare(folder, context)
    train_all(folder, context)
    group.barrier()
    first = weights(folder)
    group.barrier()
    if group.is_main:
        (folder / "run/manifest.json").unlink()
        shutil.rmtree(checkpoint_folders(folder / "run")[-1])
    group.barrier()
    train_all(folder, context)
    group.barrier()
    again = weights(folder)
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    export.run(export.Options(run=folder / "run", out=folder / "export"), context)
    group.barrier()
    indices = {f"{split}_index": folder / f"index-{split}" for split in ("train", "test")}
    evaluate.run(evaluate.Options(model=str(folder / "export"), out=folder / "evaluate", **indices), context)
    group.barrier()


def with_old_barrier(folder: Path, good: DeferredGroup, bad: OldBarrierGroup) -> dict[str, str]:
    """What goes wrong, by the stage, when the ranks of `bad` go on where those of `good` would wait."""
    said = {}

    def attempt(name: str, act: Callable[[Path, Context], None], group: DeferredGroup, *gone: str) -> None:
        if group.is_main:
            for path in gone:
                shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()
        good.barrier()
        try:
            act(folder, Context(group, torch.device("cpu")))
        except UserError as error:
            said[name] = str(error)
        good.barrier()  # an error has ended it here, or all is done: the other's files may come
        bad.catch_up()

    attempt("embed", embed_all, bad, "embed/manifest.json", "embed/.done")
    attempt("embed again", embed_all, good)
    attempt("train", train_all, bad, "run")
    attempt("resume", train_all, good, "run/manifest.json")
    return said


def queued(group: DeferredGroup) -> list[float]:
    """The group of the tests itself: nothing is there at once, and everything that looks at a result waits."""
    values = torch.full((2,), 1.0 + group.rank)
    memory = values.numpy()  # as only the stream sees it
    group.all_reduce_sum(values)
    before = float(memory[0])
    after = values.tolist()
    gathered = group.all_gather(torch.tensor([[float(group.rank)]])).numpy().sum()
    scattered = (group.reduce_scatter_sum(torch.ones(4)) + 0).sum()
    exchanged = group.exchange([torch.full((rank + 1,), 10.0 * group.rank + rank) for rank in range(2)])
    return [before, *after, float(gathered), float(scattered), *exchanged.tolist()]


@dataclass(frozen=True)
class Told:
    """Of one rank: how many of its files came late with each rank as the slow one, and what failed in the twin."""

    queued: list[float]
    late: list[int]
    said: dict[str, str]


@dataclass(frozen=True)
class Ran:
    folder: Path
    told: list[Told]


def run_everything(group: Group, folder: Path) -> Told:
    """All in one start of the ranks."""
    told = told_of(folder, group.size)
    good, bad = DeferredGroup(group.process_group, told), OldBarrierGroup(group.process_group, told)
    files, late = SlowFiles(good), []
    with stream():
        values = queued(good)
        for slow_rank in range(group.size):
            files.slow_rank, files.num_held = slow_rank, 0
            all_stages(folder / f"slow-{slow_rank}", good)
            late.append(files.num_held)
        return Told(values, late, with_old_barrier(folder / "slow-1", good, bad))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("deferred")
    for slow_rank in range(2):
        make_shards(folder / f"slow-{slow_rank}")
    return Ran(folder, run_ranks(run_everything, 2, folder, timeout_s=400))


@pytest.mark.parametrize("slow_rank", [0, 1])
def test_all_stages_with_collectives_that_return_at_once(ran: Ran, slow_rank: int) -> None:
    late = [told.late[slow_rank] for told in ran.told]
    assert late[slow_rank] >= 8 and late[1 - slow_rank] == 0
    report = json.loads((ran.folder / f"slow-{slow_rank}/evaluate/report.json").read_text())
    assert report["num_test"] == NUM_SHARDS * NUM_IMAGES


def test_a_barrier_that_only_queues_is_noticed(ran: Ran) -> None:
    """The known-bad twin."""
    first, second = (told.said for told in ran.told)
    assert "is not visible to rank 0" in first["embed"] and "embed" not in second
    assert "embed again" not in first
    assert "head-0000000003-0000000006.safetensors" in second["resume"], "rank 1's, which the checkpoint lacks"


def test_the_deferred_group_defers(ran: Ran) -> None:
    first, second = (told.queued for told in ran.told)
    assert str(first[0]) == str(second[0]) == "nan"
    assert first[1:] == [3, 3, 1, 4, 0, 10] and second[1:] == [3, 3, 1, 4, 1, 1, 11, 11]
