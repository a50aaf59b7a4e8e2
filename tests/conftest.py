"""What several folders of tests share: one thread a process, and a tiny data set made by the real stages."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from distributed_harness import TinyData, quiet_environment

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: its kernels then run on a CPU

SHARD = Path(__file__).resolve().parents[1] / "demo/shards/test/00000.tar"
NUM_IMAGES, NUM_CENTERS, NUM_LABELS = 100, 25, 4  # 25 divides by neither 2 nor 3
STAGE_TIMEOUT_S = 120


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def cut_tar(source: Path, target: Path, num_samples: int) -> None:
    """The first samples of a shard, as another shard."""
    keys: set[str] = set()
    with tarfile.open(source) as whole, tarfile.open(target, "w") as part:
        for member in whole:
            keys.add(member.name.split(".")[0])
            if len(keys) > num_samples:
                break
            part.addfile(member, whole.extractfile(member))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Index, embed (the pixels themselves), cluster and assign, through their command lines."""
    folder = tmp_path_factory.mktemp("tiny-data")
    data = TinyData(folder / "00000.tar", *(folder / name for name in ("index", "embeddings", "clusters", "labels")))
    cut_tar(SHARD, data.shard, NUM_IMAGES)
    commands: dict[str, list[object]] = {
        "index": ["--shards", data.shard, "--out", data.index],
        "embed": ["--index", data.index, "--encoder", "pixels@8", "--out", data.embeddings],
        "cluster": ["--embeddings", data.embeddings, "--out", data.clusters],
        "assign": ["--embeddings", data.embeddings, "--clusters", data.clusters, "--out", data.labels],
    }
    commands["cluster"] += ["--num-centers", NUM_CENTERS, "--num-iterations", 5]
    commands["assign"] += ["--num-labels", NUM_LABELS]
    for stage, arguments in commands.items():
        command = [sys.executable, "-m", "mlcd_ds", stage, *map(str, arguments)]
        done = subprocess.run(
            command, env=quiet_environment(), capture_output=True, text=True, timeout=STAGE_TIMEOUT_S, check=False
        )
        assert done.returncode == 0, f"{stage}: {done.stderr}"
    return data
