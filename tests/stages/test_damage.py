"""What was changed or damaged between two stages is refused in one message, or made again; it never passes."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import STAGES, message_of, run
from shard_maker import encode, picture, run_stage, write_tar

from mlcd_ds.artefacts.files import record_of, write_atomic
from mlcd_ds.artefacts.html_page import thumbnail
from mlcd_ds.artefacts.manifest import MANIFEST_NAME
from mlcd_ds.data.label_store import LabelStore
from mlcd_ds.data.sample_labels import shard_labels
from mlcd_ds.data.shard_index import ShardIndex, ShardReader
from mlcd_ds.errors import UserError


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished stages, to be spoiled. Its index names the shards of the original."""
    shutil.copytree(finished, tmp_path / "all")
    return tmp_path / "all"


def edit(path: Path, change: Any) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def resign(folder: Path, name: str) -> None:
    """Have the manifest of a folder name a changed file as it is now."""
    record = record_of(folder / name).model_dump()
    edit(folder / MANIFEST_NAME, lambda manifest: manifest["files"].update({name: record}))


def without(section: str, name: str) -> Any:
    return lambda manifest: manifest[section].pop(name)


# Manifests


@pytest.mark.parametrize(
    ("stage", "before", "change", "told"),
    [
        ("embed", "index", without("files", "1.idx"), "lists no 1.idx"),
        ("embed", "index", without("files", "2.crc32.npy"), "lists no 2.crc32.npy"),
        ("cluster", "embed", without("files", "1.npy"), "lists no 1.npy"),
        ("cluster", "embed", without("inputs", "index"), "names no index"),
        ("assign", "cluster", without("files", "centers.npy"), "lists no centers.npy"),
        ("embed", "index", lambda m: m["shards"].append(m["shards"][0]), "names shard 0 twice"),
        ("cluster", "embed", lambda m: m["shards"].__setitem__(1, m["shards"][0]), "names shard 0 twice"),
        ("embed", "index", lambda m: m["shards"][1].update(num_images=7), "do not add up to the 18 images"),
        ("cluster", "embed", lambda m: m.update(num_images=17), "do not add up to the 17 images"),
        ("assign", "cluster", lambda m: m.update(num_centers=3), "[4, 48] instead of float32 [3, 48]"),
        ("cluster", "embed", lambda m: m.update(dim=47), "[5, 48] instead of float16 [5, 47]"),
    ],
)
def test_a_manifest_that_does_not_agree_is_refused(
    folder: Path, stage: str, before: str, change: Any, told: str
) -> None:
    edit(folder / before / MANIFEST_NAME, change)
    message = message_of(run(stage, folder, out=folder / "new"))
    assert str(folder / before) in message and told in message and f"`mlcd {before} --overwrite" in message
    assert not (folder / "new" / MANIFEST_NAME).exists()


@pytest.mark.parametrize("content", [None, b'{"stage": "index", "stage": "index"}', b"[" * 100_000, b"\xff"])
def test_a_manifest_that_cannot_be_read_is_named(folder: Path, content: bytes | None) -> None:
    path = folder / "index" / MANIFEST_NAME
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)
    message = message_of(run("embed", folder, out=folder / "new"))
    assert str(path) in message and "`mlcd index --overwrite" in message


# Where a stage writes


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("overwrite", [{}, {"overwrite": True}])
def test_out_that_is_a_file_is_named(folder: Path, stage: str, overwrite: dict[str, bool]) -> None:
    (folder / "file").write_bytes(b"")
    assert f"--out {folder / 'file'} is a file" in message_of(run(stage, folder, out=folder / "file", **overwrite))


@pytest.mark.parametrize(("stage", "other"), [("embed", "index"), ("cluster", "embed"), ("assign", "index")])
def test_the_finished_work_of_another_stage_is_never_overwritten(folder: Path, stage: str, other: str) -> None:
    before = (folder / other / MANIFEST_NAME).read_bytes()
    for overwrite in ({}, {"overwrite": True}):
        message = message_of(run(stage, folder, out=folder / other, **overwrite))
        assert f"{folder / other / MANIFEST_NAME} is of `mlcd {other}`, not of `mlcd {stage}`" in message
    assert (folder / other / MANIFEST_NAME).read_bytes() == before


def test_a_full_disk_is_told_in_words(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # numpy's error then has no errno, as on full disks
    try:
        with pytest.raises(UserError, match=r"a\.npy: cannot be written \(.*requested and .* written\)"):
            write_atomic(tmp_path / "a.npy", lambda file: np.save(file, np.zeros(100_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


# Work that goes on


@pytest.mark.parametrize(
    ("stage", "damage"),
    [
        ("index", lambda note: note.update(summary={})),
        ("index", lambda note: note["summary"].update(num_images=5)),
        ("embed", lambda note: note["summary"].update(dim=47)),
        ("embed", lambda note: note["files"].clear()),
        ("embed", lambda note: note["files"]["0.npy"].update(sha256="0" * 64)),
        ("embed", lambda note: note.pop("seal")),
    ],
)
def test_work_whose_note_was_changed_is_done_again(folder: Path, finished: Path, stage: str, damage: Any) -> None:
    made_from = {"shards": finished / "shards" / "*.tar"} if stage == "index" else {}
    wanted = json.loads((folder / stage / MANIFEST_NAME).read_text())
    (folder / stage / MANIFEST_NAME).unlink()
    edit(folder / stage / ".done" / "0.json", damage)
    assert run(stage, folder, **made_from).status == 0
    assert json.loads((folder / stage / MANIFEST_NAME).read_text()) == wanted


def test_a_note_that_is_no_file_is_one_message(folder: Path) -> None:
    (folder / "embed" / MANIFEST_NAME).unlink()
    note = folder / "embed" / ".done" / "1.json"
    note.unlink()
    note.mkdir()
    assert str(note) in message_of(run("embed", folder))


def test_a_finished_shard_changed_before_the_end_is_named(folder: Path) -> None:
    (folder / "assign" / MANIFEST_NAME).unlink()
    path = folder / "assign" / "1.npy"
    labels = np.load(path)
    np.save(path, labels[:, ::-1].copy())
    message = message_of(run("assign", folder))
    assert str(path) in message and "checksum" in message and "--overwrite" in message
    np.save(path, labels)
    assert run("assign", folder).status == 0


# Contents


def test_embeddings_that_are_not_finite_are_named(folder: Path) -> None:
    rows = np.load(folder / "embed" / "1.npy")
    rows[3, 2] = np.nan
    np.save(folder / "embed" / "1.npy", rows)
    resign(folder / "embed", "1.npy")
    message = message_of(run("assign", folder, out=folder / "new"))
    assert f"{folder / 'embed' / '1.npy'} row 3 has NaN" in message and "`mlcd embed --overwrite" in message


def test_labels_that_name_more_centres_than_there_are(folder: Path) -> None:
    index = ShardIndex(folder / "index")
    highest = max(int(np.load(folder / "assign" / f"{n}.npy").max()) for n in range(3))
    edit(folder / "assign" / MANIFEST_NAME, lambda manifest: manifest.update(num_centers=highest))
    store = LabelStore(folder / "assign", index)
    with pytest.raises(UserError, match=rf"has label {highest}, but its manifest names {highest} centres"):
        for shard in range(3):
            store.shard(shard)
    with pytest.raises(UserError, match=rf"sizes\.npy holds int64 .* instead of int64 \[{highest}\]"):
        store.sizes()


@pytest.mark.parametrize("change", [{"num_labels": 3}, {"num_labels": 1}])
def test_labels_of_another_shape(folder: Path, change: dict[str, int]) -> None:
    edit(folder / "assign" / MANIFEST_NAME, lambda manifest: manifest.update(change))
    store = LabelStore(folder / "assign", ShardIndex(folder / "index"))
    with pytest.raises(UserError, match=r"0\.npy holds int32 \[5, 2\] instead of int32"):
        store.shard(0)


def test_a_shard_changed_in_the_middle_is_not_embedded(folder: Path) -> None:
    shutil.rmtree(folder / "index")
    assert run("index", folder).status == 0
    shard = folder / "shards" / "1.tar"
    status, content = shard.stat(), bytearray(shard.read_bytes())
    index = ShardIndex(folder / "index")
    samples = index.samples(1)
    place = int(samples.image.offset_N[2] + samples.image.bytes_N[2] // 2)
    content[place] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    index.check_shards()  # looks at headers only
    message = message_of(run("embed", folder, out=folder / "new"))
    assert str(shard) in message and "key 00002" in message and "`mlcd index --overwrite" in message
    content[place] ^= 1
    content[int(samples.caption.offset_N[3])] ^= 1
    shard.write_bytes(content)
    assert run("embed", folder, out=folder / "new").status == 0  # which reads no captions
    with pytest.raises(UserError, match="key 00003"):
        ShardReader(index).read(1, samples.caption, 3)


def test_equal_shards_in_another_folder_are_other_shards(folder: Path, finished: Path) -> None:
    """`folder` is a copy: the same names, sizes and times."""
    assert "done already" in run("index", folder, shards=finished / "shards" / "*.tar").err
    message = message_of(run("index", folder))
    assert str(folder / "index" / MANIFEST_NAME) in message and "shards=" in message and "--overwrite" in message


def test_a_shard_written_again_is_another_shard(folder: Path) -> None:
    assert run("index", folder, overwrite=True).status == 0
    assert "done already" in run("index", folder).err
    shard = folder / "shards" / "1.tar"
    os.utime(shard, ns=(1, 1))
    assert "shards=" in message_of(run("index", folder))


def test_a_picture_that_pillow_cannot_decode_is_grey() -> None:
    sound = encode(picture(0))
    assert thumbnail(sound) != thumbnail(sound[:-200]) == thumbnail(b"nothing")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"label": 1000000000}', "not a class number"),
        (f'{{"label": {2**70}}}', "not a class number"),
        ('{"label": "1"}', "not a class number"),
        ("[" * 100_000, "json member cannot be read"),
        ("{", "json member cannot be read"),
        ("5", "not a JSON object"),
    ],
)
def test_labels_that_are_no_class_numbers_are_named(tmp_path: Path, text: str, told: str) -> None:
    members = [("0.jpg", encode(picture(0))), ("0.json", text.encode())]
    shard = write_tar(tmp_path / "s.tar", members)
    assert run_stage("index", "--shards", shard, "--out", tmp_path / "index").status == 0
    with pytest.raises(UserError, match=told) as caught:
        shard_labels(ShardIndex(tmp_path / "index"), 0, "label")
    assert str(shard) in str(caught.value) and "key 0" in str(caught.value) and len(str(caught.value)) < 500


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Indices `train` and `test` of images with classes."""
    for seed, split in enumerate(("train", "test")):
        members = []
        for number in range(24):
            image = encode(np.full((8, 8, 3), 40 + 120 * (number % 2) + seed, np.uint8))
            members += [(f"{number}.jpg", image), (f"{number}.json", json.dumps({"label": number % 2}).encode())]
        write_tar(tmp_path / f"{split}.tar", members)
        assert run_stage("index", "--shards", tmp_path / f"{split}.tar", "--out", tmp_path / split).status == 0
    return tmp_path


def test_features_changed_under_a_resumed_evaluation_are_named(labelled: Path) -> None:
    flags = ["--model", "pixels@4", "--train-index", labelled / "train", "--test-index", labelled / "test"]
    flags += ["--out", labelled / "out"]
    assert run_stage("evaluate", *flags).status == 0
    wanted = (labelled / "out" / "report.json").read_bytes()
    for name in ("features/train/train.npy", "features/test/test.labels.npy"):
        (labelled / "out" / MANIFEST_NAME).unlink()
        path = labelled / "out" / name
        sound = path.read_bytes()
        np.save(path, np.load(path)[::-1].copy())
        message = message_of(run_stage("evaluate", *flags))
        assert str(path) in message and "checksum" in message and "--overwrite" in message
        path.write_bytes(sound)
        assert run_stage("evaluate", *flags).status == 0
        assert (labelled / "out" / "report.json").read_bytes() == wanted


def test_ids_are_not_taken_for_classes(labelled: Path) -> None:
    image = encode(picture(0, 8, 8))
    members = [("0.jpg", image), ("0.json", b'{"label": 0}'), ("1.jpg", image), ("1.json", b'{"label": 999999}')]
    shard = write_tar(labelled / "ids.tar", members)
    assert run_stage("index", "--shards", shard, "--out", labelled / "ids").status == 0
    flags = ["--model", "pixels@4", "--train-index", labelled / "ids", "--test-index", labelled / "test"]
    message = message_of(run_stage("evaluate", *flags, "--out", labelled / "out"))
    assert str(labelled / "ids") in message and "999999" in message and "--label-key" in message


def test_what_cannot_be_measured_is_named_before_it_is_tried(labelled: Path) -> None:
    image = encode(picture(0, 8, 8))
    members = [pair for n in range(12) for pair in ((f"{n}.jpg", image), (f"{n}.json", b'{"label": %d}' % n))]
    for name, count, told in (("few", 4, "too few for kNN"), ("lone", 12, "no class has two labelled images")):
        shard = write_tar(labelled / f"{name}.tar", members[: 2 * count])
        assert run_stage("index", "--shards", shard, "--out", labelled / name).status == 0
        flags = ["--model", "pixels@4", "--train-index", labelled / name, "--test-index", labelled / "test"]
        message = message_of(run_stage("evaluate", *flags, "--out", labelled / f"out-{name}"))
        assert str(labelled / name) in message and told in message
