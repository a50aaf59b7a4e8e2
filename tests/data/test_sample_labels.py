"""Labels of samples: CLIP_benchmark's .cls members and its layout of shards, beside .json; indexes without them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from shard_maker import encode, picture, read_independently, run_stage, write_tar

from mlcd_ds.artefacts.files import record_of
from mlcd_ds.artefacts.manifest import MANIFEST_NAME
from mlcd_ds.data.sample_labels import shard_labels
from mlcd_ds.data.shard_index import ShardIndex
from mlcd_ds.errors import UserError


def clip_benchmark_folder(folder: Path, num_shards: int = 2, kind: str = "webp") -> Path:
    """As its webdataset builder writes them: test/N.tar with images and .cls, test/nshards.txt."""
    for shard in range(num_shards):
        members = []
        for number in range(5):
            key, image = f"s{shard}{number:06d}", encode(picture(10 * shard + number), kind.upper())
            members += [(f"{key}.cls", str((shard + number) % 3).encode()), (f"{key}.{kind}", image)]
        write_tar(folder / "test" / f"{shard}.tar", members)
    (folder / "test" / "nshards.txt").write_text(f"{num_shards}\n")
    return folder


def indexed(tmp_path: Path, *shards: object) -> ShardIndex:
    finished = run_stage("index", "--shards", *shards, "--out", tmp_path / "index")
    assert finished.status == 0, finished.err
    return ShardIndex(tmp_path / "index")


def test_class_numbers_are_those_that_webdataset_reads(tmp_path: Path) -> None:
    folder = clip_benchmark_folder(tmp_path)
    index = indexed(tmp_path, folder / "test")
    assert [entry.path.name for entry in index.shards] == ["0.tar", "1.tar"]
    for shard, entry in enumerate(index.shards):
        labels = shard_labels(index, shard, "label").tolist()
        assert labels == [int(sample["cls"]) for sample in read_independently(entry.path)] == labels
        assert labels != [int(sample["cls"]) for sample in read_independently(index.shards[1 - shard].path)]


def test_json_comes_before_cls(tmp_path: Path) -> None:
    image = encode(picture(0))
    members = [("0.cls", b"1"), ("0.json", b'{"label": 2}'), ("0.jpg", image)]
    members += [("1.cls", b"1\n"), ("1.json", b'{"other": 2}'), ("1.jpg", image), ("2.jpg", image)]
    index = indexed(tmp_path, write_tar(tmp_path / "s.tar", members))
    assert shard_labels(index, 0, "label").tolist() == [2, 1, -1]


@pytest.mark.parametrize("text", ["cat", "-1", "1.5", "9" * 5000, "1000000"])
def test_what_is_no_class_number_is_named(tmp_path: Path, text: str) -> None:
    shard = write_tar(tmp_path / "s.tar", [("0.cls", text.encode()), ("0.jpg", encode(picture(0)))])
    with pytest.raises(UserError, match=r"key 0: its \.cls member is") as caught:
        shard_labels(indexed(tmp_path, shard), 0, "label")
    assert len(str(caught.value)) < 500


def test_changed_class_numbers_are_noticed(tmp_path: Path) -> None:
    folder = clip_benchmark_folder(tmp_path)
    index = indexed(tmp_path, folder / "test")
    path, offset = index.shards[0].path, int(index.samples(0).class_number.offset_N[2])
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="was changed"):
        shard_labels(index, 0, "label")


def test_an_index_of_before_has_no_class_numbers(tmp_path: Path) -> None:
    """Their checksums have three columns, and so have those of shards without any .cls."""
    indexed(tmp_path, clip_benchmark_folder(tmp_path) / "test")
    path = tmp_path / "index" / "0.crc32.npy"
    crcs = np.load(path)
    assert crcs.shape == (5, 4)
    np.save(path, crcs[:, :3])
    manifest = json.loads((tmp_path / "index" / MANIFEST_NAME).read_text())
    manifest["files"]["0.crc32.npy"] = record_of(path).model_dump()
    (tmp_path / "index" / MANIFEST_NAME).write_text(json.dumps(manifest))
    old = ShardIndex(tmp_path / "index")
    assert shard_labels(old, 0, "label").tolist() == [-1] * 5 and shard_labels(old, 1, "label").min() >= 0
    np.save(path, crcs[:, :2])
    manifest["files"]["0.crc32.npy"] = record_of(path).model_dump()
    (tmp_path / "index" / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="2 kinds"):
        ShardIndex(tmp_path / "index").samples(0)
    indexed(tmp_path / "plain", write_tar(tmp_path / "s.tar", [("0.jpg", encode(picture(0)))]))
    assert np.load(tmp_path / "plain/index/s.crc32.npy").shape == (1, 3)


@pytest.mark.parametrize(("text", "told"), [("3", "2.tar is not there"), ("many", "no number"), ("0", "no number")])
def test_a_wrong_nshards_is_named(tmp_path: Path, text: str, told: str) -> None:
    folder = clip_benchmark_folder(tmp_path)
    (folder / "test/nshards.txt").write_text(text)
    finished = run_stage("index", "--shards", folder / "test", "--out", tmp_path / "index")
    assert finished.status == 2 and told in finished.err and "nshards.txt" in finished.err
