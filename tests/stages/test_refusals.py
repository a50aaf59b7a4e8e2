"""What a stage will not do, and that it says so in one message that names the file and the fix."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from commands import STAGES, message_of, run
from shard_maker import ROOT, Finished, plain_shard, run_stage

from mlcd_ds.artefacts.manifest import MANIFEST_NAME
from mlcd_ds.clustering.kmeans_state import STATE_NAME


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished stages, to be spoiled."""
    shutil.copytree(finished, tmp_path / "all")
    return tmp_path / "all"


def other_set(folder: Path, counts: tuple[int, ...]) -> Path:
    """Another finished set of shards, beside."""
    other = folder.parent / "other"
    for number, count in enumerate(counts):
        plain_shard(other / "shards" / f"{number}.tar", count, seed=10 + number)
    for stage in STAGES:
        assert run(stage, other).status == 0
    return other


def train(index: Path, labels: Path, *overrides: str) -> Finished:
    config = ROOT / "ds_configs" / "zero1_fp32_cpu.json"
    keys = [f"data.index={index}", f"data.labels={labels}", "train.global_batch=8", "data.num_streams=4"]
    return run_stage("train", "--dry-run", "--deepspeed_config", config, *keys, *overrides)


# Bad flags


@pytest.mark.parametrize(
    ("stage", "changed", "named"),
    [
        ("index", {"max_megapixels": 0}, ["--max-megapixels", "'0'", "greater than 0"]),
        ("index", {"num_threads": "many"}, ["--num-threads", "'many'"]),
        ("embed", {"batch_size": 0}, ["--batch-size", "'0'"]),
        ("cluster", {"num_centers": 1}, ["--num-centers", "'1'"]),
        ("cluster", {"num_iterations": 0, "seed": -1}, ["--num-iterations", "--seed", "'-1'"]),
        ("assign", {"num_labels": 0}, ["--num-labels"]),
        ("assign", {"threshold": "nan"}, ["--threshold 'nan'", "finite"]),
        ("index", {"max_megapixels": "inf"}, ["--max-megapixels", "finite"]),
        ("index", {"num_threads": 100_000}, ["--num-threads", "512"]),
        ("embed", {"num_threads": 100_000}, ["--num-threads", "512"]),
        ("embed", {"batch_size": 10**9}, ["--batch-size", "65536"]),
        ("cluster", {"seed": 2**70}, ["--seed"]),
        ("cluster", {"num_centers": "9" * 5000}, ["--num-centers", "9999...9999"]),
        ("cluster", {"metric": "x" * 5000}, ["--metric", "cosine"]),
        ("embed", {"index": ""}, ["--index", "empty"]),
        ("assign", {"num_lables": 3}, ["--num-lables"]),
        ("embed", {"encoder": "no-such-encoder"}, ["'no-such-encoder'", "efficientnet-lite0"]),
        ("embed", {"encoder": "pixels@big"}, ["'pixels@big'", "size"]),
        ("cluster", {"num_centers": 19}, ["--num-centers 19", "18 images"]),
        ("assign", {"num_labels": 5}, ["--num-labels 5", "4 centres"]),
    ],
)
def test_bad_values_are_named(finished: Path, stage: str, changed: dict[str, object], named: list[str]) -> None:
    before = sorted(finished.rglob("*"))
    message = message_of(run(stage, finished, **{"out": finished / "nothing", **changed}))
    assert all(text in message for text in named), message
    assert sorted(finished.rglob("*")) == before


@pytest.mark.parametrize("stage", STAGES)
def test_a_missing_flag_is_named(stage: str) -> None:
    assert "--out" in message_of(run_stage(stage))


# What came before


@pytest.mark.parametrize(
    ("stage", "before", "made_by"),
    [
        ("embed", "index", "index"),
        ("cluster", "embed", "embed"),
        ("assign", "embed", "embed"),
        ("assign", "cluster", "cluster"),
    ],
)
def test_without_its_input_a_stage_names_the_command_that_makes_it(
    folder: Path, stage: str, before: str, made_by: str
) -> None:
    (folder / before / MANIFEST_NAME).unlink()
    message = message_of(run(stage, folder, out=folder / "new"))
    assert str(folder / before / MANIFEST_NAME) in message and f"`mlcd {made_by} --out" in message
    shutil.rmtree(folder / before)
    assert f"`mlcd {made_by} --out" in message_of(run(stage, folder, out=folder / "new"))
    assert not (folder / "new").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"stage": "index"}'])
def test_a_broken_manifest_is_named(folder: Path, content: bytes) -> None:
    (folder / "index" / MANIFEST_NAME).write_bytes(content)
    message = message_of(run("embed", folder, out=folder / "new"))
    assert str(folder / "index" / MANIFEST_NAME) in message and "`mlcd index --overwrite" in message


def test_the_folder_of_another_stage_is_named(folder: Path) -> None:
    message = message_of(run("cluster", folder, embeddings=folder / "index", out=folder / "new"))
    assert str(folder / "index" / MANIFEST_NAME) in message and "embed" in message


def test_labels_of_another_number_of_images(folder: Path) -> None:
    other = other_set(folder, (5, 6))
    message = message_of(train(folder / "index", other / "assign"))
    assert str(other / "assign") in message and str(folder / "index") in message
    assert "11 images" in message and "18" in message and "assign again" in message


def test_labels_of_another_index_with_as_many_images(folder: Path) -> None:
    other = other_set(folder, (5, 6, 7))
    for stage in STAGES[2:]:  # the sets are alike but for the pixels' bytes
        assert run(stage, other, overwrite=True).status == 0
    message = message_of(train(folder / "index", other / "assign"))
    assert str(other / "assign") in message and "checksums differ" in message and "assign again" in message
    assert train(folder / "index", folder / "assign").status == 0
    assert train(other / "index", other / "assign").status == 0


def test_centres_of_another_dimension(folder: Path) -> None:
    assert run("embed", folder, encoder="pixels@5", out=folder / "wide").status == 0
    message = message_of(run("assign", folder, embeddings=folder / "wide", out=folder / "new"))
    assert str(folder / "cluster") in message and str(folder / "wide") in message
    assert "48" in message and "75" in message and not (folder / "new").exists()


@pytest.mark.parametrize(("stage", "file"), [("cluster", "embed/1.npy"), ("assign", "cluster/centers.npy")])
def test_a_changed_file_of_an_earlier_stage_is_named(folder: Path, stage: str, file: str) -> None:
    content = bytearray((folder / file).read_bytes())
    content[-1] ^= 1
    (folder / file).write_bytes(content)
    message = message_of(run(stage, folder, out=folder / "new"))
    assert str(folder / file) in message and "checksum" in message and "--overwrite" in message


def test_a_missing_shard_is_named(folder: Path) -> None:
    moved = folder.parent / "moved"
    shutil.copytree(folder, moved)
    assert run("index", moved, overwrite=True).status == 0 and run("embed", moved, out=moved / "new").status == 0
    (moved / "shards" / "2.tar").unlink()
    assert str(moved / "shards" / "2.tar") in message_of(run("embed", moved, out=moved / "newer"))


# What is there already


@pytest.mark.parametrize(
    ("stage", "changed", "was", "now"),
    [
        ("index", {"max_megapixels": 3}, "max_megapixels=50.0", "max_megapixels=3.0"),
        ("embed", {"encoder": "pixels@5"}, "encoder='pixels@4'", "encoder='pixels@5'"),
        ("cluster", {"num_centers": 5}, "num_centers=4", "num_centers=5"),
        ("cluster", {"seed": 7}, "seed=0", "seed=7"),
        ("assign", {"num_labels": 3}, "num_labels=2", "num_labels=3"),
    ],
)
def test_other_parameters_are_refused_unless_overwrite(
    folder: Path, stage: str, changed: dict[str, object], was: str, now: str
) -> None:
    message = message_of(run(stage, folder, **changed))
    assert str(folder / stage / MANIFEST_NAME) in message and was in message and now in message
    assert "--overwrite" in message and "another --out" in message
    assert run(stage, folder, overwrite=True, **changed).status == 0
    again = run(stage, folder, **changed)
    assert again.status == 0 and "done already" in again.err


@pytest.mark.parametrize(("stage", "role"), [("embed", "index"), ("cluster", "embeddings"), ("assign", "embeddings")])
def test_other_inputs_are_refused(folder: Path, stage: str, role: str) -> None:
    other = other_set(folder, (5, 6, 7))
    given = other / {"index": "index", "embeddings": "embed"}[role]
    message = message_of(run(stage, folder, **{role: given}))
    assert str(folder / stage / MANIFEST_NAME) in message and "made from other" in message and "--overwrite" in message


@pytest.mark.parametrize(("stage", "file"), [("index", "1.idx"), ("embed", "1.npy"), ("cluster", "centers.npy")])
def test_an_output_that_went_missing_is_named(finished: Path, folder: Path, stage: str, file: str) -> None:
    (folder / stage / file).unlink()
    made_from = {"shards": finished / "shards" / "*.tar"} if stage == "index" else {}
    message = message_of(run(stage, folder, **made_from))
    assert str(folder / stage / file) in message and "--overwrite" in message


def test_out_that_cannot_be_written_is_named(folder: Path) -> None:
    (folder / "file").write_bytes(b"")
    message = message_of(run("assign", folder, out=folder / "file"))
    assert str(folder / "file") in message and "--out" in message


def test_overwrite_on_a_file_is_named(folder: Path) -> None:
    (folder / "file").write_bytes(b"")
    message = message_of(run("assign", folder, out=folder / "file", overwrite=True))
    assert str(folder / "file") in message and "is a file" in message
    assert (folder / "file").exists()


def test_train_refuses_triton_without_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    message = message_of(train(folder / "index", folder / "assign", "head.kernel=triton"))
    assert "head.kernel=auto" in message


# What the system does not allow


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Whoever runs the tests, within it file permissions count: root becomes nobody for the time being."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def foreign(finished: Path) -> Iterator[Path]:
    """A copy of the finished stages that everybody may read and nobody but the owner may write."""
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        shutil.copytree(finished, f"{parent}/all")
        assert run("index", Path(parent, "all"), overwrite=True).status == 0  # of these shards
        for path in Path(parent).rglob("*"):
            path.chmod(0o555 if path.is_dir() else 0o444)
        yield Path(parent, "all")
        for path in (Path(parent, "all"), *Path(parent).rglob("*")):
            path.chmod(0o755)


@pytest.mark.parametrize(
    ("stage", "closed"),
    [
        ("embed", "index/manifest.json"),
        ("embed", "index"),
        ("cluster", "embed/1.npy"),
        ("assign", "cluster/centers.npy"),
        ("embed", "shards/1.tar"),
        ("index", "shards/1.tar"),
    ],
)
def test_without_permission_to_read_the_file_is_named(foreign: Path, stage: str, closed: str) -> None:
    (foreign / closed).chmod(0)
    with tempfile.TemporaryDirectory() as out:
        os.chmod(out, 0o777)
        with ordinary_user():
            done = run(stage, foreign, out=Path(out, "new"))
        (foreign / closed).chmod(0o555)
        message = message_of(done)
        assert str(foreign / closed) in message and "ermission" in message


@pytest.mark.parametrize(("stage", "changed"), [("cluster", {"out": "new"}), ("embed", {"overwrite": True})])
def test_without_permission_to_write_the_folder_is_named(foreign: Path, stage: str, changed: dict) -> None:
    changed = {key: foreign / value if key == "out" else value for key, value in changed.items()}
    foreign.chmod(0o555)
    with ordinary_user():
        done = run(stage, foreign, **changed)
    message = message_of(done)
    assert str(foreign) in message and "ermission denied" in message


def test_a_damaged_state_of_cluster_is_named(folder: Path) -> None:
    (folder / "cluster" / MANIFEST_NAME).unlink()
    state = folder / "cluster" / STATE_NAME
    sound = state.read_bytes()
    for content in (sound[:30], sound[:-10], b"", bytes(np.zeros(400, np.uint8))):
        state.write_bytes(content)
        message = message_of(run("cluster", folder))
        assert str(state) in message and "--overwrite" in message
    state.write_bytes(sound)
    assert run("cluster", folder).status == 0
