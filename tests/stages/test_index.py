"""`mlcd index`: what it keeps, against DALI's own tools and the webdataset package; resuming; changed shards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def
from shard_maker import (
    DAMAGED,
    DEMO_SHARDS,
    ROOT,
    child_environment,
    encode,
    picture,
    plain_shard,
    read_independently,
    run_stage,
    write_tar,
)
from wds2idx import IndexCreator

from mlcd_ds.artefacts.manifest import read_manifest
from mlcd_ds.data.shard_index import (
    CAPTIONS_ENDING,
    ENDINGS,
    IndexManifest,
    ShardIndex,
    ShardReader,
    format_idx,
    parse_idx,
    parse_line,
)
from mlcd_ds.errors import UserError

# In the order of damaged.json's entries.
REASONS = {
    "JPEG cut at 60% of its bytes": "cannot be decoded",
    "empty JPEG (0 bytes)": "empty image",
    "not an image": "not an image",
    "no image": "no image",
    "header claims 60000 x 60000 pixels": "too many pixels",
    "key leads out of the folder": "key leads out of the folder",
    "key of an earlier sample": "duplicate key",
}


def index_of(out: Path, *shards: Path | str, flags: tuple[str, ...] = ()) -> ShardIndex:
    finished = run_stage("index", "--shards", *shards, "--out", out, *flags)
    assert finished.status == 0, finished.err
    return ShardIndex(out)


def refused(out: Path, *shards: Path | str, flags: tuple[str, ...] = ()) -> str:
    """The message of a run that must fail."""
    finished = run_stage("index", "--shards", *shards, "--out", out, *flags)
    assert finished.status == 2 and "Traceback" not in finished.err, finished.err
    (message,) = [line for line in finished.err.splitlines() if line.startswith("error: ")]
    return message


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Modification time and size of every file below."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file()
    }


# What is kept


def test_every_damaged_sample_is_kept_or_dropped_as_it_should(tmp_path: Path) -> None:
    before = tree(tmp_path)
    index = index_of(tmp_path / "deep" / "out", DAMAGED)
    entries = json.loads(DAMAGED.with_suffix(".json").read_text())
    assert index.samples(0).keys == [entry["key"] for entry in entries if entry["kept"]]
    dropped = json.loads((tmp_path / "deep" / "out" / "dropped.json").read_text())
    wanted = [[entry["key"], REASONS[entry["damage"]]] for entry in entries if not entry["kept"]]
    assert sorted(dropped["samples"]["damaged"]) == sorted(wanted)
    assert index.manifest.dropped == {reason: 1 for reason in REASONS.values()}
    captionless = sum(entry["kept"] and entry["damage"] == "no caption" for entry in entries)
    assert index.manifest.num_captions == index.num_images - captionless
    outside = {name for name in tree(tmp_path) if not name.startswith("deep/out/")}
    assert outside == set(before), "files were written outside of --out"
    assert not list(tmp_path.parent.glob("evil*"))


def test_members_read_by_the_index_are_those_that_webdataset_reads(tmp_path: Path) -> None:
    index = index_of(tmp_path, DEMO_SHARDS / "test" / "*.tar")
    assert len(index.shards) == 3
    reader = ShardReader(index, max_open=1)
    for number, entry in enumerate(index.shards):
        table = index.samples(number)
        wanted = list(read_independently(entry.path))
        assert table.keys == [sample["__key__"] for sample in wanted]
        for row in range(0, len(wanted), 29):
            for extension, span in (("jpg", table.image), ("txt", table.caption), ("json", table.metadata)):
                assert reader.read(number, span, row) == wanted[row][extension]
        assert (table.sizes_N2 == 128).all()
    reader.close()


def parsed(path: Path) -> list:
    return [parse_line(line) for line in path.read_text().splitlines()[1:]]


def test_idx_of_a_sound_shard_is_that_of_wds2idx(tmp_path: Path) -> None:
    shard = DEMO_SHARDS / "test" / "00001.tar"
    index_of(tmp_path / "out", shard)
    with IndexCreator(str(shard), str(tmp_path / "theirs.idx"), verbose=False) as creator:
        creator.create_index()
    theirs = parsed(tmp_path / "theirs.idx")
    assert parsed(tmp_path / "out" / "00001.idx") == theirs and len(theirs) > 100
    assert (tmp_path / "out" / "00001.idx").read_text().split()[0] == (tmp_path / "theirs.idx").read_text().split()[0]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_in_every_tar_dialect(tmp_path: Path, format: int) -> None:
    folder = "part/" + "x" * 60 + "/" + "y" * 60
    names = [f"{folder}/{number}.jpg" for number in range(3)]
    names += [] if format == tarfile.USTAR_FORMAT else ["z" * 150 + ".jpg"]
    images = [encode(picture(number)) for number in range(len(names))]
    shard = write_tar(tmp_path / "long.tar", list(zip(names, images, strict=True)), format)
    index = index_of(tmp_path / "out", shard)
    index.check_shards()
    assert [f"{key}.jpg" for key in index.samples(0).keys] == names
    reader = ShardReader(index)
    assert [reader.read(0, index.samples(0).image, row) for row in range(len(names))] == images
    with IndexCreator(str(shard), str(tmp_path / "theirs.idx"), verbose=False) as creator:
        creator.create_index()
    # wds2idx takes the extended header of GNU tar for the member's own.
    assert (parsed(tmp_path / "out" / "long.idx") == parsed(tmp_path / "theirs.idx")) == (format != tarfile.GNU_FORMAT)


def read_by_dali(shard: Path, idx: Path, num_samples: int) -> list[tuple[bytes, bytes]]:
    """Images and captions (empty where there is none), as DALI's own reader finds them."""

    @pipeline_def(batch_size=num_samples, num_threads=1, device_id=None)
    def graph():
        return tuple(
            fn.readers.webdataset(
                paths=[str(shard)],
                index_paths=[str(idx)],
                ext=["jpg;jpeg;png;webp", "txt"],
                missing_component_behavior="empty",
                name="reader",
            )
        )

    pipeline = graph()
    pipeline.build()
    assert pipeline.reader_meta("reader")["epoch_size"] == num_samples
    images, captions = pipeline.run()
    return [(bytes(images.at(row)), bytes(captions.at(row))) for row in range(num_samples)]


def test_dalis_reader_yields_exactly_the_kept_samples(tmp_path: Path) -> None:
    index = index_of(tmp_path, DAMAGED)
    members: dict[str, dict[str, bytes]] = {}
    with tarfile.open(DAMAGED) as archive:
        for member in archive:
            key, _, extension = member.name.rpartition(".")
            members.setdefault(key, {}).setdefault(extension, archive.extractfile(member).read())
    kept = [entry["key"] for entry in json.loads(DAMAGED.with_suffix(".json").read_text()) if entry["kept"]]
    wanted = [(members[key]["jpg"], members[key].get("txt", b"")) for key in kept]
    assert read_by_dali(DAMAGED, tmp_path / "damaged.idx", index.num_images) == wanted


def test_odd_names(tmp_path: Path) -> None:
    image, other = encode(picture(0, 20, 30)), encode(picture(1, 50, 60), "PNG")
    members = [
        ("README", b"no extension, no sample"),
        ("a/1.JPG", image),  # an extension is the same in capitals
        ("a/2.seg.png", other),  # an extension may hold a dot: no image
        ("a/2.jpg", image),
        ("a/3", b"no extension, but a sample's key"),
        ("a/3.jpg", image),
        ("b/3.webp", encode(picture(2, 8, 9), "WEBP")),  # the same name in another folder is another sample
        ("c/4.png", other),  # of two images the first counts
        ("c/4.jpg", image),
        ("with space.jpg", image),
        ("/absolute.jpg", image),
        ("a/../../b.jpg", image),
        ("..jpg", image),
        ("déjà vu".replace(" ", "_") + ".jpg", image),
        (b"latin\xe9.jpg".decode("utf-8", "surrogateescape"), image),
    ]
    index = index_of(tmp_path / "out", write_tar(tmp_path / "odd.tar", members))
    table = index.samples(0)
    assert table.keys == ["a/1", "a/2", "a/3", "b/3", "c/4", "déjà_vu"]
    assert table.sizes_N2.tolist() == [[20, 30], [20, 30], [20, 30], [8, 9], [50, 60], [20, 30]]
    reader = ShardReader(index)
    assert reader.read(0, table.image, 4) == other and reader.read(0, table.image, 1) == image
    assert reader.read(0, table.caption, 0) == b""
    dropped = dict(json.loads((tmp_path / "out" / "dropped.json").read_text())["samples"]["odd"])
    assert dropped == {
        "with space": "white space in the name",
        "/absolute": "key leads out of the folder",
        "a/../../b": "key leads out of the folder",
        "": "no image",
        "latin\\udce9": "name is not UTF-8",
    }
    index.check_shards()
    assert len(read_by_dali(tmp_path / "odd.tar", tmp_path / "out" / "odd.idx", 6)) == 6


def test_max_megapixels(tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "s.tar", [("0.jpg", encode(picture(0, 50, 40))), ("1.jpg", encode(picture(1, 51, 40)))]
    )
    index = index_of(tmp_path / "out", shard, flags=("--max-megapixels", "0.002"))
    assert index.samples(0).keys == ["0"] and index.manifest.dropped == {"too many pixels": 1}


# What is not a shard


def test_shards_that_cannot_be_read_are_named_or_skipped(tmp_path: Path) -> None:
    sound = plain_shard(tmp_path / "sound.tar", 3)
    whole = sound.read_bytes()
    broken = {
        "cut-in-image": whole[:1500],
        "cut-after-member": whole[: whole.index(b"00001.txt")],
        "cut-before-the-end": whole[: whole.rindex(b"picture 2") + 512],
        "bad-header": whole.replace(b"00001.jpg", b"00001.?pg"),  # its checksum is wrong now
        "not-a-tar": b"<html>404</html>" * 100,
        "empty": b"",
    }
    for name, content in broken.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
    (tmp_path / "folder.tar").mkdir()
    for name in (*broken, "folder"):
        message = refused(tmp_path / "out", tmp_path / "sound.tar", tmp_path / f"{name}.tar")
        assert f"{tmp_path / name}.tar" in message and "--skip-unreadable-shards" in message and "1 shards" in message
    index = index_of(tmp_path / "out", tmp_path / "*.tar", flags=("--skip-unreadable-shards",))
    assert [entry.name for entry in index.shards] == ["sound"] and index.num_images == 3
    told = json.loads((tmp_path / "out" / "dropped.json").read_text())["shards"]
    assert len(told) == len(broken) + 1


def raw_header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar header that claims any size (in base 256, as GNU tar writes large ones)."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def with_pax(name: str, content: bytes, **pax: str) -> bytes:
    """A member with an extended header, without the end of an archive."""
    info = tarfile.TarInfo(name)
    info.size, info.pax_headers = len(content), {key.replace("_", "."): value for key, value in pax.items()}
    return info.tobuf(tarfile.PAX_FORMAT) + content + bytes(-len(content) % 512)


SPARSE = {"GNU_sparse_major": "1", "GNU_sparse_minor": "0", "GNU_sparse_name": "x.jpg", "GNU_sparse_realsize": "9"}
IMPOSSIBLE = {
    "negative": raw_header("x.jpg", -512),
    "negative to the start": raw_header("x.jpg", -1_000_000),
    "negative text": raw_header("x.txt", -1024),
    "negative of an unknown kind": raw_header("x.jpg", -1024, b"?"),
    "negative long name": raw_header("././@LongLink", -1024, tarfile.GNUTYPE_LONGNAME),
    "2^40": raw_header("x.jpg", 2**40),
    "2^40 text": raw_header("x.txt", 2**40),
    "2^40 long name": raw_header("././@LongLink", 2**40, tarfile.GNUTYPE_LONGNAME),
    "2^70": raw_header("x.jpg", 2**70),
    "2^70 extended header": raw_header("x", 2**70, tarfile.XHDTYPE),
    "pax size": with_pax("x.jpg", b"1234", size="-5"),
    "pax 2^70": with_pax("x.jpg", b"1234", size=str(2**70)),
    "sparse map": with_pax("x.jpg", b"1234", GNU_sparse_map="0,x,1"),
    "sparse 1.0": with_pax("x.jpg", b"garbage\n", **SPARSE),
    "sparse 1.0 cut": with_pax("x.jpg", b"9\n0\n", **SPARSE),
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_impossible_headers_make_a_shard_unreadable(tmp_path: Path, what: str) -> None:
    sound = plain_shard(tmp_path / "sound.tar", 2).read_bytes()
    for name, before in (("first", b""), ("later", sound[: sound.rindex(b"picture 1") + 512])):
        shard = tmp_path / f"{name}.tar"
        shard.write_bytes(before + IMPOSSIBLE[what] + sound)
        message = refused(tmp_path / "out", shard)
        assert str(shard) in message and "--skip-unreadable-shards" in message and len(message) < 500
    index = index_of(tmp_path / "out", tmp_path / "*.tar", flags=("--skip-unreadable-shards",))
    assert [entry.name for entry in index.shards] == ["sound"]


def test_sparse_members_are_dropped_and_counted(tmp_path: Path) -> None:
    image = encode(picture(0))
    sparse = with_pax("1.jpg", image, GNU_sparse_map=f"0,{len(image)}", GNU_sparse_size=str(len(image) + 5000))
    sound = write_tar(tmp_path / "s.tar", [("0.jpg", image), ("2.jpg", image)]).read_bytes()
    begin = 512 + len(image) + -len(image) % 512
    (tmp_path / "s.tar").write_bytes(sound[:begin] + sparse + sound[begin:])
    index = index_of(tmp_path / "out", tmp_path / "s.tar")
    assert index.samples(0).keys == ["0", "2"] and index.manifest.dropped == {"sparse member": 1}


def test_what_is_no_file_is_an_unreadable_shard(tmp_path: Path) -> None:
    plain_shard(tmp_path / "sound.tar", 2)
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "dangling.tar").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop.tar").symlink_to(tmp_path / "loop.tar")
    (tmp_path / "link.tar").symlink_to(tmp_path / "sound.tar")
    message = refused(tmp_path / "out", tmp_path / "*.tar")
    assert all(f"{tmp_path / name}: not a regular file" in message for name in ("pipe.tar", "nothing", "loop.tar"))
    index = index_of(tmp_path / "out", tmp_path / "*.tar", flags=("--skip-unreadable-shards",))
    assert [entry.path.name for entry in index.shards] == ["sound.tar"]


def test_a_shard_that_was_fetched_again_is_read_again(tmp_path: Path) -> None:
    shard = plain_shard(tmp_path / "s.tar", 3)
    sound = shard.read_bytes()
    shard.write_bytes(b"?" * len(sound))
    assert "s.tar" in refused(tmp_path / "out", shard)
    shard.write_bytes(sound)  # as many bytes as before
    assert index_of(tmp_path / "out", shard).num_images == 3


def test_no_usable_image_is_an_error(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", [("0.jpg", b"nothing"), ("1.txt", b"no image")])
    assert "dropped.json" in refused(tmp_path / "out", shard)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_pattern_without_match_is_named(tmp_path: Path) -> None:
    plain_shard(tmp_path / "s.tar", 1)
    assert f"'{tmp_path}/none-*.tar'" in refused(tmp_path / "out", tmp_path / "s.tar", f"{tmp_path}/none-*.tar")
    assert not (tmp_path / "out").exists()


def test_shards_of_the_same_name_in_two_folders(tmp_path: Path) -> None:
    for number, folder in enumerate(("a", "b/c")):
        plain_shard(tmp_path / folder / "00000.tar", 2 + number, seed=number)
    index = index_of(tmp_path / "out", f"{tmp_path}/**/*.tar")
    assert {entry.name: entry.num_images for entry in index.shards} == {"a--00000": 2, "b--c--00000": 3}
    assert {entry.path for entry in index.shards} == set(tmp_path.glob("**/00000.tar"))


def test_names_that_would_collide_are_refused(tmp_path: Path) -> None:
    paths = [plain_shard(tmp_path / name, 1) for name in ("a--0.tar", "a/0.tar", "b.tar")]
    message = refused(tmp_path / "out", *paths)
    assert str(paths[0]) in message and str(paths[1]) in message


# Running again


@pytest.fixture
def three_shards(tmp_path: Path) -> Path:
    for number in range(3):
        plain_shard(tmp_path / "shards" / f"{number}.tar", 4 + number, seed=number)
    return tmp_path


def fingerprint(folder: Path) -> str:
    return read_manifest(folder, IndexManifest, "index").fingerprint


def test_a_second_run_changes_nothing(three_shards: Path) -> None:
    out = three_shards / "out"
    index_of(out, f"{three_shards}/shards/*.tar")
    before = tree(three_shards)
    finished = run_stage("index", "--shards", f"{three_shards}/shards/*.tar", "--out", out)
    assert finished.status == 0 and "done already" in finished.err
    assert tree(three_shards) == before


def test_an_interrupted_run_goes_on_shard_by_shard(three_shards: Path) -> None:
    out = three_shards / "out"
    index_of(out, f"{three_shards}/shards/*.tar")
    wanted, before = fingerprint(out), tree(out)
    for name in ("manifest.json", ".done/1.json", "1.idx"):
        (out / name).unlink()
    (out / ".1.idx.partial").write_bytes(b"half")  # as a kill leaves it
    (out / "2.sizes.npy").write_bytes(b"cut")  # an output that is not what its note says
    index_of(out, f"{three_shards}/shards/*.tar")
    after = tree(out)
    assert fingerprint(out) == wanted and set(after) == set(before)
    redone = {name for name in after if after[name] != before[name]}
    assert redone == {"manifest.json", "dropped.json"} | {
        f"{shard}{ending}" for shard in (1, 2) for ending in (*ENDINGS, CAPTIONS_ENDING)
    } | {".done/1.json", ".done/2.json"}


def test_two_ranks_write_what_one_writes(three_shards: Path) -> None:
    plain_shard(three_shards / "shards" / "3.tar", 2, seed=3)
    (three_shards / "shards" / "3.tar").write_bytes((three_shards / "shards" / "3.tar").read_bytes()[:700])
    flags = ["--shards", f"{three_shards}/shards/*.tar", "--skip-unreadable-shards", "--out"]
    assert run_stage("index", *flags, three_shards / "one").status == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "mlcd_ds", "index", *flags, str(three_shards / "two")]
    done = subprocess.run(command, env=child_environment(), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert fingerprint(three_shards / "two") == fingerprint(three_shards / "one")
    one, two = ShardIndex(three_shards / "one"), ShardIndex(three_shards / "two")
    assert one.shards == two.shards and one.manifest.dropped == two.manifest.dropped


# Shards that changed


def test_changed_shards_are_noticed(three_shards: Path) -> None:
    index = index_of(three_shards / "out", f"{three_shards}/shards/*.tar")
    index.check_shards()
    shard = three_shards / "shards" / "1.tar"
    sound = shard.read_bytes()
    samples = list(read_independently(shard))

    def rewritten(members: list[tuple[str, bytes]]) -> bytes:
        return write_tar(three_shards / "other.tar", members).read_bytes()

    renamed = rewritten([(f"9{s['__key__']}.{e}", s[e]) for s in samples for e in ("jpg", "txt")])
    turned = rewritten([(f"{s['__key__']}.{e}", s[e]) for s in reversed(samples) for e in ("jpg", "txt")])
    last = rewritten(
        [
            (f"{s['__key__']}.{e}", s[e] + b"\0" * (s is samples[-1] and e == "jpg"))
            for s in samples
            for e in ("jpg", "txt")
        ]
    )
    for content, what in (
        (sound + b"\0", "bytes"),
        (renamed, "has no 00000.jpg"),
        (turned, "has no"),
        (last, "00004.jpg"),
    ):
        shard.write_bytes(content)
        assert what == "bytes" or len(content) == len(sound)
        with pytest.raises(UserError, match=what) as caught:
            index.check_shards()
        assert str(shard) in str(caught.value) and "mlcd index --overwrite" in str(caught.value)
        index.check_shards(0, 2)  # the first of two ranks looks at shards 0 and 2
        with pytest.raises(UserError):
            index.check_shards(1, 2)
    shard.write_bytes(sound)
    os.utime(shard)
    index.check_shards()
    shard.unlink()
    with pytest.raises(UserError, match=r"1\.tar is missing"):
        index.check_shards()


def test_a_damaged_index_is_named(three_shards: Path) -> None:
    index = index_of(three_shards / "out", f"{three_shards}/shards/*.tar")
    idx = three_shards / "out" / "0.idx"
    sound = idx.read_bytes()
    other_extension, ends = sound.replace(b"jpg", b"jpx"), [sound.index(b"\n") + 1, sound.rindex(b"\n", 0, -1) + 1]
    newlines = [b"\n" * len(sound), sound[: ends[0]] + b"\n" * (len(sound) - ends[0]), sound[: ends[1]] + b"\n" * 5]
    for content in (b"", sound[:-40], b"\xff" * len(sound), other_extension, sound[: ends[1]] + b"jpg", *newlines):
        idx.write_bytes(content)
        with pytest.raises(UserError, match=r"0\.idx"):
            index.check_shards()
            index.samples(0)
    idx.unlink()
    with pytest.raises(UserError, match=r"0\.idx is missing"):
        index.check_shards()


def test_a_shard_cut_after_indexing_is_named_when_read(three_shards: Path) -> None:
    index = index_of(three_shards / "out", f"{three_shards}/shards/*.tar")
    with open(three_shards / "shards" / "2.tar", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match=r"2\.tar"):
        ShardReader(index).read(2, index.samples(2).image, 5)


def test_a_shard_set_that_grew_needs_overwrite(three_shards: Path) -> None:
    out = three_shards / "out"
    index_of(out, f"{three_shards}/shards/*.tar")
    plain_shard(three_shards / "shards" / "3.tar", 1)
    message = refused(out, f"{three_shards}/shards/*.tar")
    assert "shards=" in message and "--overwrite" in message
    before = tree(out)
    assert index_of(out, f"{three_shards}/shards/*.tar", flags=("--overwrite",)).num_images == 4 + 5 + 6 + 1
    assert all(tree(out)[name] != before[name] for name in before)


def test_parse_reads_what_format_writes(tmp_path: Path) -> None:
    index = index_of(tmp_path / "out", DAMAGED)
    path = tmp_path / "out" / "damaged.idx"
    (tmp_path / "again.idx").write_bytes(format_idx(parsed(path)))
    assert (tmp_path / "again.idx").read_bytes() == path.read_bytes()
    crcs = np.load(tmp_path / "out" / "damaged.crc32.npy")
    keys, image, caption, metadata, _ = parse_idx(path.read_bytes(), crcs)
    assert keys == index.samples(0).keys and (image.offset_N % 512 == 0).all()
    assert (caption.offset_N < 0).tolist() == [key == "000000007" for key in keys]
    assert (metadata.offset_N < 0).tolist() == [key == "000000008" for key in keys]
    assert np.array_equal(caption.bytes_N < 0, caption.offset_N < 0)
