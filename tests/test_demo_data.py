"""The demo set and the damaged shard are what their documents say, read with tarfile and PIL alone."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
SHARDS = ROOT / "demo" / "shards"
DAMAGED = ROOT / "tests" / "data"
SPLITS = ("train", "test")
MEMBERS = ["jpg", "txt", "json"]
MAX_SHARD_BYTES = 1_900_000
MAX_PACKED_BYTES = 13_500_000  # as git keeps it: each file deflated
MAX_CORRELATION = 0.95  # the set is built with 0.93 on the pictures before JPEG
MAX_IMAGE_PIXELS = 40_000_000

Sample = tuple[str, dict[str, bytes]]


def read_shard(path: Path) -> list[Sample]:
    """Samples in the tar's order: neighbouring members of one key; a member that comes twice begins a new sample."""
    samples: list[Sample] = []
    with tarfile.open(path) as tar:
        for member in tar:
            head, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            key = f"{head}/{stem}" if head else stem
            if not samples or samples[-1][0] != key or extension in samples[-1][1]:
                samples.append((key, {}))
            file = tar.extractfile(member)
            assert file is not None, member.name
            samples[-1][1][extension] = file.read()
    return samples


def decode(jpeg: bytes) -> np.ndarray:
    """uint8 [height, width, 3]; raises OSError or ValueError on what cannot be read or claims too many pixels."""
    with Image.open(io.BytesIO(jpeg)) as image:
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels")
        return np.asarray(image.convert("RGB"))


def fingerprint(pixels: np.ndarray) -> bytes:
    """32 x 32 at 4 bits."""
    return (np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BOX)) >> 4).tobytes()


def thumbnails(images: Iterable[np.ndarray]) -> np.ndarray:
    """16 x 16 thumbnails less their mean and of length one: float32 [n, 768]."""
    small = [np.asarray(Image.fromarray(i).resize((16, 16), Image.Resampling.BOX), np.float32).ravel() for i in images]
    rows = np.stack(small)
    rows -= rows.mean(axis=1, keepdims=True)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def shared_pictures(train: list[np.ndarray], test: list[np.ndarray]) -> set[int]:
    """Indices of the test images that are in train as well: exact repeats, near ones and mirror images."""
    known = {fingerprint(image) for image in train}
    exact = {i for i, image in enumerate(test) if fingerprint(image) in known}
    rows, plain, mirrored = thumbnails(train), thumbnails(test), thumbnails([image[:, ::-1] for image in test])
    highest = np.maximum((plain @ rows.T).max(axis=1), (mirrored @ rows.T).max(axis=1))
    return exact | set(np.flatnonzero(highest > MAX_CORRELATION).tolist())


@pytest.fixture(scope="module")
def classes() -> list[str]:
    return json.loads((SHARDS / "classes.json").read_text())


@pytest.fixture(scope="module")
def by_split() -> dict[str, list[Sample]]:
    return {
        split: [sample for path in sorted((SHARDS / split).glob("*.tar")) for sample in read_shard(path)]
        for split in SPLITS
    }


@pytest.fixture(scope="module")
def records(by_split: dict[str, list[Sample]]) -> dict[str, list[dict]]:
    return {split: [json.loads(members["json"]) for _, members in by_split[split]] for split in SPLITS}


@pytest.fixture(scope="module")
def images(by_split: dict[str, list[Sample]]) -> dict[str, list[np.ndarray]]:
    return {split: [decode(members["jpg"]) for _, members in by_split[split]] for split in SPLITS}


def test_sizes_stay_under_the_limits() -> None:
    paths = [path for path in SHARDS.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in paths) <= MAX_SHARD_BYTES
    assert sum(len(zlib.compress(path.read_bytes())) for path in paths) <= MAX_PACKED_BYTES
    assert (DAMAGED / "damaged.tar").stat().st_size < 200_000


@pytest.mark.parametrize("split", SPLITS)
def test_members_stand_together_in_order_under_img2dataset_keys(split: str) -> None:
    paths = sorted((SHARDS / split).glob("*.tar"))
    assert [path.name for path in paths] == [f"{shard:05d}.tar" for shard in range(len(paths))]
    for shard, path in enumerate(paths):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        keys = [f"{shard:05d}{offset:04d}" for offset in range(len(members) // 3)]
        assert [m.name for m in members] == [f"{key}.{extension}" for key in keys for extension in MEMBERS]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}


@pytest.mark.parametrize("split", SPLITS)
def test_every_image_is_a_square_rgb_jpeg(
    split: str, by_split: dict[str, list[Sample]], images: dict[str, list[np.ndarray]]
) -> None:
    assert {image.shape for image in images[split]} == {(128, 128, 3)}
    headers = [Image.open(io.BytesIO(members["jpg"])) for _, members in by_split[split]]
    assert {(header.format, header.mode) for header in headers} == {("JPEG", "RGB")}


@pytest.mark.parametrize("split", SPLITS)
def test_records_agree_with_their_samples_and_classes(
    split: str, by_split: dict[str, list[Sample]], records: dict[str, list[dict]], classes: list[str]
) -> None:
    assert classes == sorted(set(classes))
    for (key, members), record in zip(by_split[split], records[split], strict=True):
        assert record["key"] == key
        assert record["caption"] == members["txt"].decode() and record["caption"].strip()
        assert record["license"] == {"clipart": "public domain", "emoji": "MIT"}[record["source"]]
        assert (record["width"], record["height"]) == (128, 128)
        assert (record["label"] is None) == (record["class"] is None)
        assert record["label"] is None or classes[record["label"]] == record["class"]


def test_held_out_images_are_labelled_and_every_class_is_in_both_splits(
    records: dict[str, list[dict]], classes: list[str]
) -> None:
    assert len(records["test"]) >= 800
    for split in SPLITS:
        assert {record["class"] for record in records[split]} - {None} == set(classes)
    assert None not in {record["class"] for record in records["test"]}


def test_summary_counts_what_is_there(records: dict[str, list[dict]]) -> None:
    summary = json.loads((SHARDS / "summary.json").read_text())
    assert summary["images"] == {split: len(records[split]) for split in SPLITS}
    counted = Counter((r["class"], f"{split} {r['source']}") for split in SPLITS for r in records[split])
    written = {
        (None if row["class"] == "(no class)" else row["class"], column): count
        for row in summary["counts"]
        for column, count in row.items()
        if column != "class"
    }
    assert counted == Counter(written)


def test_no_picture_is_in_both_splits(images: dict[str, list[np.ndarray]]) -> None:
    assert shared_pictures(images["train"], images["test"]) == set()


def test_an_origin_is_in_one_split_only(records: dict[str, list[dict]]) -> None:
    origins = Counter((r["source"], r["origin"]) for split in SPLITS for r in records[split])
    assert max(origins.values()) == 1


@pytest.mark.parametrize("change", ["none", "mirrored", "saved again", "resized"])
def test_the_finder_reports_a_train_image_put_into_test(change: str, images: dict[str, list[np.ndarray]]) -> None:
    """The known-bad twin of `test_no_picture_is_in_both_splits`."""
    image = images["train"][100]
    if change == "mirrored":
        image = image[:, ::-1]
    elif change == "saved again":
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=40)
        image = decode(file.getvalue())
    elif change == "resized":
        image = np.asarray(Image.fromarray(image).resize((90, 90), Image.Resampling.BICUBIC))
    planted = [*images["test"], np.ascontiguousarray(image)]
    assert shared_pictures(images["train"], planted) == {len(planted) - 1}


def is_good(key: str, members: dict[str, bytes], seen: set[str]) -> bool:
    """What an index has to find out, in the plainest way."""
    if key in seen or ".." in Path(key).parts or "jpg" not in members:
        return False
    try:
        decode(members["jpg"])
    except (OSError, ValueError, Image.DecompressionBombError):
        return False
    return True


def test_damaged_shard_holds_what_its_list_says() -> None:
    rows = json.loads((DAMAGED / "damaged.json").read_text())
    samples = read_shard(DAMAGED / "damaged.tar")
    assert [key for key, _ in samples] == [row["key"] for row in rows]
    seen: set[str] = set()
    for (key, members), row in zip(samples, rows, strict=True):
        assert is_good(key, members, seen) == row["kept"], row
        seen.add(key)
    modes = {
        row["damage"]: Image.open(io.BytesIO(members["jpg"])).mode
        for (_, members), row in zip(samples, rows, strict=True)
        if row["damage"] in ("CMYK", "greyscale")
    }
    assert modes == {"CMYK": "CMYK", "greyscale": "L"}
    lacking = {row["damage"]: set(MEMBERS) - set(members) for (_, members), row in zip(samples, rows, strict=True)}
    assert (lacking["no caption"], lacking["no json"], lacking["no image"]) == ({"txt"}, {"json"}, {"jpg"})
    assert all(not missing for damage, missing in lacking.items() if not str(damage).startswith("no "))


def test_damaged_shard_is_made_by_its_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DAMAGED))
    import make_damaged

    make_damaged.write(tmp_path)
    assert (tmp_path / "damaged.json").read_bytes() == (DAMAGED / "damaged.json").read_bytes()
    ours, stored = read_shard(tmp_path / "damaged.tar"), read_shard(DAMAGED / "damaged.tar")
    assert [(key, list(members)) for key, members in ours] == [(key, list(members)) for key, members in stored]
