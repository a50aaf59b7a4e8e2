"""Shards made for tests, stages run in this process, and shards read without our code (by the webdataset package)."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import webdataset
from PIL import Image

from mlcd_ds.artefacts.files import record_of
from mlcd_ds.artefacts.manifest import write_manifest
from mlcd_ds.data.label_store import LabelManifest
from mlcd_ds.data.shard_index import ShardIndex

ROOT = Path(__file__).parent.parent
DEMO_SHARDS = ROOT / "demo" / "shards"
DAMAGED = ROOT / "tests" / "data" / "damaged.tar"


@dataclass(frozen=True)
class Finished:
    """What a command left: exit status, stdout and stderr."""

    status: int
    out: str
    err: str


LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_ID")


def child_environment() -> dict[str, str]:
    """For processes that a test starts: one thread each, no launcher's variables."""
    kept = {key: value for key, value in os.environ.items() if key not in LAUNCHERS}
    return {**kept, "OMP_NUM_THREADS": "1"}


def run_stage(name: str, *flags: object) -> Finished:
    """Run `mlcd NAME FLAGS...` in this process; the environment is put back afterwards."""
    out, err = io.StringIO(), io.StringIO()
    entry = importlib.import_module("mlcd_ds.cli" if name == "cli" else f"mlcd_ds.stages.{name}").main
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.dict(os.environ):
        for key in LAUNCHERS:
            os.environ.pop(key, None)
        try:
            status = entry([str(flag) for flag in flags])
        except SystemExit as end:
            status = end.code
    return Finished(status, out.getvalue(), err.getvalue())


def run_child(name: str, *flags: object) -> Finished:
    """Run `mlcd NAME FLAGS...` in a process of its own: DeepSpeed initialises a process once."""
    command = [sys.executable, "-m", "mlcd_ds", name, *map(str, flags)]
    done = subprocess.run(
        command, cwd=ROOT, env=child_environment(), capture_output=True, text=True, timeout=240, check=False
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def encode(pixels: np.ndarray, kind: str = "JPEG", mode: str | None = None, **options: object) -> bytes:
    """A picture's bytes."""
    file, image = io.BytesIO(), Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()


def picture(seed: int, height: int = 40, width: int = 40) -> np.ndarray:
    """uint8 noise [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT) -> Path:
    """A tar of the given names and contents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def plain_shard(path: Path, num_images: int, seed: int = 0) -> Path:
    """A shard of small sound JPEGs with captions."""
    members = []
    for number in range(num_images):
        image = encode(picture(1000 * seed + number))
        members += [(f"{number:05d}.jpg", image), (f"{number:05d}.txt", f"picture {number}".encode())]
    return write_tar(path, members)


def read_independently(path: Path) -> Iterator[Mapping[str, bytes]]:
    """Samples of a shard as the webdataset package reads them."""
    yield from webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)


def colour(number: int) -> tuple[int, int, int]:
    """The colour that stands for a number below 4096: 16 levels a channel, far apart."""
    return tuple(8 + 15 * (number >> shift & 15) for shift in (8, 4, 0))


def number_of(image_3SS: np.ndarray) -> int:
    """The number whose colour fills a picture (0-255 scale)."""
    assert float(np.ptp(image_3SS, axis=(1, 2)).max()) < 1e-3, "not of one colour"
    levels = (image_3SS[:, 0, 0] - 8) / 15
    digits = levels.round().astype(int)
    assert np.abs(levels - digits).max() < 1e-3, levels
    return int(digits[0] << 8 | digits[1] << 4 | digits[2])


@dataclass(frozen=True)
class PaintedShards:
    """An index and labels of one-coloured images; `label_of` says, by the image's number, what its labels are."""

    index: Path
    labels: Path
    num_images: int
    counts: tuple[int, ...]

    @staticmethod
    def label_of(number: int) -> list[int]:
        return [number * 7919 % 1009, number]


def paint_shards(folder: Path) -> PaintedShards:
    """Five uneven shards, one of them without any sound image; the labels follow an independent reading of the tars."""
    generator, number, counts = np.random.default_rng(0), 0, []
    for shard, num_images in enumerate((37, 1, 90, 0, 53)):
        members = [("broken.jpg", b"not an image")]
        for _ in range(num_images):
            height, width = generator.integers(1, 60, 2)
            image = encode(np.full((height, width, 3), colour(number), np.uint8), "PNG")
            members += [(f"{number:04d}.json", b"{}"), (f"{number:04d}.png", image)]
            if number % 10 == 3:
                members += [(f"{number:04d}x.txt", b"no image"), (f"{number:04d}y.jpg", encode(picture(1))[:300])]
            number += 1
        write_tar(folder / "shards" / f"{shard}.tar", members)
        counts.append(num_images)
    finished = run_stage("index", "--shards", folder / "shards" / "*.tar", "--out", folder / "index")
    assert finished.status == 0, finished.err
    index = ShardIndex(folder / "index")
    kept = [[int(s["__key__"]) for s in read_independently(entry.path) if "png" in s] for entry in index.shards]
    labels = [np.array([PaintedShards.label_of(key) for key in keys], np.int32).reshape(-1, 2) for keys in kept]
    write_labels(folder / "labels", index, labels)
    return PaintedShards(folder / "index", folder / "labels", number, tuple(counts))


def write_labels(folder: Path, index: ShardIndex, labels: list[np.ndarray]) -> None:
    """A label store as `mlcd assign` leaves it, of int32 [n, 2] for each shard."""
    files = {}
    folder.mkdir()
    for entry, labels_NP in zip(index.shards, labels, strict=True):
        np.save(folder / f"{entry.name}.npy", labels_NP)
        files[f"{entry.name}.npy"] = record_of(folder / f"{entry.name}.npy")
    manifest = LabelManifest(
        stage="assign",
        parameters={},
        inputs={"index": index.manifest.fingerprint},
        files=files,
        versions={},
        num_images=index.num_images,
        num_labels=2,
        num_centers=1009,
    )
    write_manifest(folder, manifest)
