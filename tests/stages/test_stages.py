"""The stages as commands: help, dry runs, the three ways to start one, and picking up where a run was ended."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import COUNTS, STAGES, flags_of, message_of, run
from shard_maker import ROOT, child_environment, run_stage

from mlcd_ds.artefacts.manifest import MANIFEST_NAME, Manifest, read_manifest
from mlcd_ds.cli import STAGES as ALL_STAGES
from mlcd_ds.clustering.embedding_store import EmbeddingManifest
from mlcd_ds.data import reference
from mlcd_ds.data.dali import WholeImages
from mlcd_ds.data.shard_index import ShardIndex, ShardReader
from mlcd_ds.encoders.base import Encoder
from mlcd_ds.encoders.registry import load_encoder
from mlcd_ds.stages import embed

NEXT = {"index": "embed", "embed": "cluster", "cluster": "assign", "assign": "train"}


def times(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def start(*command: object) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=ROOT, env=child_environment(), capture_output=True, text=True, timeout=120)


def fingerprint(folder: Path, stage: str) -> str:
    kind = type("AnyManifest", (Manifest,), {"model_config": {"frozen": True, "extra": "ignore"}})
    return read_manifest(folder / stage, kind, stage).fingerprint


# Help


@pytest.mark.parametrize("stage", STAGES)
def test_help_says_how_and_what_comes_next(stage: str) -> None:
    done = run_stage(stage, "--help")
    assert done.status == 0 and not done.err
    assert f"usage: mlcd {stage}" in done.out and f"  mlcd {stage} --" in done.out
    assert f"The next stage is `mlcd {NEXT[stage]}`" in done.out
    for flag in ("--out", "--dry-run", "--overwrite", "(default: "):
        assert flag in done.out


@pytest.mark.parametrize("stage", ALL_STAGES)
def test_every_stage_of_mlcd_has_help(stage: str) -> None:
    done = run_stage("cli", stage, "-h")
    assert done.status == 0 and f"usage: mlcd {stage}" in done.out


def test_mlcd_alone_lists_the_stages() -> None:
    asked, bare, wrong = run_stage("cli", "--help"), run_stage("cli"), run_stage("cli", "idnex")
    assert asked.status == 0 and asked.out == bare.out and bare.status == 2
    assert [line.split()[0] for line in asked.out.splitlines()[3:]] == list(ALL_STAGES)
    assert wrong.status == 2 and "'idnex'" in wrong.err and "index" in wrong.err


def test_all_ways_to_start_a_stage_are_the_same(finished: Path) -> None:
    """The console script and python -m."""
    ways = (
        [Path(sys.executable).parent / "mlcd", "index"],
        [sys.executable, "-m", "mlcd_ds", "index"],
    )
    helps = [start(*way, "--help") for way in ways]
    assert all(done.returncode == 0 and done.stdout == helps[0].stdout for done in helps), helps
    assert helps[0].stdout == run_stage("index", "--help").out
    again = [start(*way, *flags_of("index", finished, max_megapixels=2)) for way in ways]
    assert [done.returncode for done in again] == [2, 2] and again[0].stderr == again[1].stderr
    assert again[0].stderr.startswith("error: ") and again[0].stderr.count("\n") == 1


# Running


@pytest.mark.parametrize("stage", STAGES)
def test_a_dry_run_writes_nothing(finished: Path, stage: str) -> None:
    before = times(finished)
    done = run(stage, finished, dry_run=True, out=finished / "new" / stage)
    assert done.status == 0 and str(finished / "new" / stage) in done.err
    assert times(finished) == before and not (finished / "new").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_second_run_does_nothing(finished: Path, stage: str) -> None:
    before = times(finished)
    done = run(stage, finished)
    assert done.status == 0 and done.err == f"{stage}: done already, nothing to do ({finished / stage})\n"
    assert times(finished) == before


def test_two_runs_make_the_same(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "shards", tmp_path / "shards")
    for stage in STAGES:
        assert run(stage, tmp_path).status == 0
        assert fingerprint(tmp_path, stage) == fingerprint(finished, stage)


@pytest.mark.parametrize("stage", ["embed", "assign"])
def test_an_interrupted_run_redoes_one_shard(finished: Path, tmp_path: Path, stage: str) -> None:
    shutil.copytree(finished, tmp_path / "all")
    out = tmp_path / "all" / stage
    before = times(out)
    for name in (MANIFEST_NAME, ".done/1.json", "1.npy"):
        (out / name).unlink()
    done = run(stage, tmp_path / "all")
    assert done.status == 0, done.err
    after = times(out)
    redone = {name for name in after if after[name] != before.get(name)}
    redone = {name for name in redone if not name.startswith(("tensorboard/", "report."))}
    assert redone - {"sizes.npy", "similarity/1.npy"} == {MANIFEST_NAME, ".done/1.json", "1.npy"}
    assert fingerprint(tmp_path / "all", stage) == fingerprint(finished, stage)


def test_notes_of_other_parameters_are_not_taken(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "all")
    (tmp_path / "all" / "embed" / MANIFEST_NAME).unlink()
    assert run("embed", tmp_path / "all", encoder="pixels@5").status == 0
    assert np.load(tmp_path / "all" / "embed" / "1.npy").shape == (COUNTS[1], 75)


def test_cluster_goes_on_from_its_state(finished: Path, tmp_path: Path) -> None:
    """Fewer iterations, then more in the same folder, give what one run gives, bit for bit."""
    shutil.copytree(finished / "embed", tmp_path / "embed")
    assert run("cluster", tmp_path, num_iterations=1).status == 0
    (tmp_path / "cluster" / MANIFEST_NAME).unlink()
    state = times(tmp_path / "cluster")["state.safetensors"]
    assert run("cluster", tmp_path).status == 0
    assert times(tmp_path / "cluster")["state.safetensors"] > state
    assert fingerprint(tmp_path, "cluster") == fingerprint(finished, "cluster")
    report = (tmp_path / "cluster" / MANIFEST_NAME).read_text()
    assert report == (finished / "cluster" / MANIFEST_NAME).read_text()
    # All iterations were done but the manifest: nothing is iterated again.
    (tmp_path / "cluster" / MANIFEST_NAME).unlink()
    state = times(tmp_path / "cluster")["state.safetensors"]
    assert run("cluster", tmp_path).status == 0
    assert times(tmp_path / "cluster")["state.safetensors"] == state


def test_two_ranks_embed_what_one_embeds(finished: Path, tmp_path: Path) -> None:
    done = start(
        sys.executable,
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "mlcd_ds", "embed"),
        *flags_of("embed", finished, out=tmp_path / "embed"),
    )
    assert done.returncode == 0, done.stderr
    assert fingerprint(tmp_path, "embed") == fingerprint(finished, "embed")


# Embedding


def test_embeddings_are_the_encoders_of_the_very_images(finished: Path) -> None:
    index, encoder = ShardIndex(finished / "index"), load_encoder("pixels@4")
    manifest = read_manifest(finished / "embed", EmbeddingManifest, "embed")
    assert (manifest.num_images, manifest.dim) == (sum(COUNTS), 48)
    assert manifest.shards == [(str(number), count) for number, count in enumerate(COUNTS)]
    reader = ShardReader(index)
    for number in range(3):
        table = index.samples(number)
        images = [reader.read(number, table.image, row) for row in range(len(table.keys))]
        batch = WholeImages(images, table.sizes_N2)
        wanted = torch.nn.functional.normalize(reference.load_whole(batch, encoder.pixels).flatten(1), dim=1).numpy()
        got = np.load(finished / "embed" / f"{number}.npy")
        assert got.dtype == np.float16 and np.allclose(np.linalg.norm(got.astype(float), axis=1), 1, atol=1e-3)
        assert np.abs(got - wanted).max() < 0.05  # two grey levels (measured: 0.032): each pass rounds; and fp16
        assert np.abs(np.roll(got, 1, axis=0) - wanted).max() > 0.1  # known-bad twin
    reader.close()


def test_nan_is_traced_to_the_image(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def spoiled(specification: str) -> Encoder:
        sound = load_encoder(specification)

        def encode(images: torch.Tensor) -> torch.Tensor:
            features = sound.encode(images).clone()
            calls.append(len(features))
            if len(calls) == 4:  # the second batch of the second shard
                features[1, 3] = float("nan")
            return features

        return Encoder(sound.name, sound.pixels, sound.network, encode)

    monkeypatch.setattr(embed, "load_encoder", spoiled)
    message = message_of(run("embed", finished, out=tmp_path / "embed", batch_size=3))
    assert calls == [3, 2, 3, 3]
    assert str(finished / "shards" / "1.tar") in message and "key 00004" in message and "pixels@4" in message
    assert "NaN" in message and not (tmp_path / "embed" / MANIFEST_NAME).exists()
