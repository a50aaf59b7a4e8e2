"""Index WebDataset shards: find every usable sample, and every bad one, once.

Each image is decoded by DALI, the decoder that training uses, so that a broken one is found here and never later.
Captions are looked at too: what objectives over texts leave out is counted. Writes, per shard, a DALI index
(`NAME.idx`), the image sizes, checksums and usable captions, and for the set `dropped.json`: which samples were left
out, and why. The shards themselves are only read.

  mlcd index --shards 'laion/part-*/*.tar' --out runs/laion/index
  srun mlcd index ...        the same, with the shards dealt over the tasks

The next stage is `mlcd embed`.
"""

from __future__ import annotations

import glob
import io
import os
import stat
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field

from mlcd_ds.artefacts.files import FileRecord, write_array, write_atomic, write_json
from mlcd_ds.artefacts.manifest import library_versions, write_manifest
from mlcd_ds.artefacts.readers import brief, read_bytes
from mlcd_ds.artefacts.typed import MAX_THREADS
from mlcd_ds.data.captions import REASONS, USABLE, caption_state, caption_text
from mlcd_ds.data.dali import decoded_sizes
from mlcd_ds.data.shard_index import (
    CAPTIONS_ENDING,
    NUM_KINDS,
    TAR_BLOCK,
    IndexManifest,
    Member,
    ShardEntry,
    format_idx,
    member_kind,
    split_name,
)
from mlcd_ds.data.tokenizers import CLIP_CONTEXT, Tokenizer, clip_tokenizer
from mlcd_ds.errors import UserError
from mlcd_ds.stages import runner
from mlcd_ds.stages.per_shard import for_each_shard, work_key

DECODE_BATCH = 128
NSHARDS, MAX_NSHARDS = "nshards.txt", 10_000_000
RESERVED_NAMES = ("sizes", "centers")
LONG = f"over {CLIP_CONTEXT} tokens"  # of CLIP's: such captions are used, and cut
DECODE_BYTES = 20_000_000  # of encoded images: bounds the memory that a batch of large photographs takes


class Options(runner.StageOptions):
    """Options of `mlcd index`."""

    shards: tuple[str, ...] = Field(
        description="tars to index: paths, quoted glob patterns, folders with nshards.txt", min_length=1
    )
    max_megapixels: float = Field(50.0, gt=0, description="drop larger images (their decoding would exhaust memory)")
    num_threads: int = Field(2, ge=1, le=MAX_THREADS, description="decoding threads of a rank")
    skip_unreadable_shards: bool = Field(False, description="leave out tars that are broken, instead of failing")


def find_shards(patterns: tuple[str, ...]) -> dict[str, Path]:
    """Unique name -> path of every tar, in sorted order. A name is the part in which the paths differ."""
    paths: list[Path] = []
    for pattern in patterns:
        # Not Path.resolve, which raises where links go in a circle.
        found = [Path(os.path.realpath(match)) for match in glob.glob(pattern, recursive=True)]
        found = sorted(path for match in found for path in _tars_of(match))
        if not found:
            raise UserError(f"--shards {pattern!r} matches no file (from {Path.cwd()}).")
        paths += found
    paths = sorted(set(paths))
    root = os.path.commonpath([path.parent for path in paths])
    named: dict[str, Path] = {}
    for path in paths:
        name = str(path.relative_to(root).with_suffix("")).replace(os.sep, "--")
        if name in named:
            raise UserError(f"--shards: {named[name]} and {path} would both be called {name!r}. Rename one.")
        if name in RESERVED_NAMES:
            raise UserError(f"--shards: {path}: a stage's own file is called {name!r}. Rename the shard.")
        named[name] = path
    return named


def _tars_of(path: Path) -> list[Path]:
    """The path itself; of a folder in CLIP_benchmark's layout the tars 0.tar, 1.tar, ... that nshards.txt counts."""
    if not (path / NSHARDS).is_file():
        return [path]
    fix = "It holds the number of tars beside it. Correct it, or name the tars."
    text = read_bytes(path / NSHARDS, fix).strip()
    if not text.isdigit() or not 0 < int(text) <= MAX_NSHARDS:
        raise UserError(f"--shards {path / NSHARDS}: {text[:50]!r} is no number of tars. {fix}")
    tars = [path / f"{number}.tar" for number in range(int(text))]
    missing = [tar for tar in tars if not tar.exists()]
    if missing:
        raise UserError(f"--shards {path / NSHARDS} counts {len(tars)} tars, but {missing[0]} is not there. {fix}")
    return tars


def stamp_of(path: Path) -> tuple[int, int] | None:
    """Size and time of change of a regular file; None for all else (a folder, a pipe, a link to nothing)."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


class Sample:
    """Members of one key in the order of the tar, the bytes of image and caption, and the CRC-32 of image, caption,
    metadata and class number."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.members: list[Member] = []
        self.image: bytes | None = None
        self.caption: bytes | None = None
        self.crcs = [0] * NUM_KINDS
        self.is_sparse = False


@contextmanager
def damaged_headers() -> Iterator[None]:
    """Turn the many kinds of errors that tarfile raises for damaged extended headers into its own."""
    try:
        yield
    except (tarfile.TarError, OSError):
        raise
    except Exception as error:
        raise tarfile.ReadError(f"damaged header: {brief(error)}") from None


def sound_members(archive: tarfile.TarFile, num_bytes: int) -> Iterator[tarfile.TarInfo]:
    """Members of a tar of `num_bytes`. tarfile.ReadError for headers that no such tar can have."""
    while True:
        with damaged_headers():
            info = archive.next()
        if info is None:
            return
        # A sparse file takes less room than it has bytes.
        if info.size < 0 or (not info.issparse() and info.isreg() and info.offset_data + info.size > num_bytes):
            raise tarfile.ReadError(f"{readable(info.name)!r} claims {info.size} bytes at byte {info.offset_data}")
        yield info


def read_samples(path: Path) -> Iterator[Sample]:
    """Samples of a tar, as runs of members with the same key. Only regular files with an extension count; nothing is
    written to disk. A tar without its end-of-archive mark was cut short: tarfile.ReadError."""
    sample: Sample | None = None
    with damaged_headers():
        opened = tarfile.open(path, "r:")  # reads the first header
    with opened as archive:
        for info in sound_members(archive, path.stat().st_size):
            key, extension = split_name(info.name)
            if not info.isreg() or not extension:
                continue
            repeated = sample is not None and any(m.extension == extension for m in sample.members)
            if sample is None or key != sample.key or repeated:
                if sample is not None:
                    yield sample
                sample = Sample(key)
            add_member(sample, archive, info, extension)
        if sample is not None:
            yield sample
        archive.fileobj.seek(archive.offset)  # tarfile stops at a bad header as at the end
        if archive.fileobj.read(TAR_BLOCK) != bytes(TAR_BLOCK):
            raise tarfile.ReadError(f"neither a member nor the end of the archive at byte {archive.offset}")


def add_member(sample: Sample, archive: tarfile.TarFile, info: tarfile.TarInfo, extension: str) -> None:
    """Add a member to its sample; what stages read later is read here, too."""
    kind = member_kind(extension)
    is_first = all(member_kind(member.extension) != kind for member in sample.members)
    sample.members.append(Member(extension, info.offset_data, info.size, info.name))
    sample.is_sparse |= info.issparse()
    if kind is not None and is_first and not sample.is_sparse:
        content = archive.extractfile(info).read()  # type: ignore[union-attr]
        sample.crcs[kind] = zlib.crc32(content)
        if kind == 0:
            sample.image = content
        elif kind == 1:
            sample.caption = content


def readable(name: str) -> str:
    """The name as text that can be written; bytes that are not UTF-8 show as escapes."""
    return name.encode(errors="backslashreplace").decode()


def header_problem(sample: Sample, seen: set[str], max_pixels: float) -> str | None:
    """Why a sample cannot be used, as far as its names and the image's header tell."""
    if sample.key in seen:
        return "duplicate key"
    if sample.key.startswith("/") or ".." in sample.key.split("/"):
        return "key leads out of the folder"
    if sample.is_sparse:
        return "sparse member"  # its bytes do not lie in one piece
    if sample.image is None:
        return "no image"
    if any(member.name != readable(member.name) for member in sample.members):
        return "name is not UTF-8"
    if any(character.isspace() for member in sample.members for character in member.name):
        return "white space in the name"  # a DALI index cannot hold it
    if not sample.image:
        return "empty image"
    try:
        with Image.open(io.BytesIO(sample.image)) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        return "too many pixels"
    except Exception:  # Pillow raises many kinds for bytes that are no image
        return "not an image"
    return "too many pixels" if width * height > max_pixels else None


class ShardScan:
    """Goes through one tar: collects the usable samples with their sizes, and the reasons for the others."""

    def __init__(self, options: Options, tokenizer: Tokenizer) -> None:
        self._options, self._tokenizer = options, tokenizer
        self._pending: list[Sample] = []
        self._pending_bytes = 0
        self.usable: list[list[Member]] = []
        self.sizes: list[tuple[int, int]] = []
        self.crcs: list[list[int]] = []
        self.dropped: list[tuple[str, str]] = []
        self.caption_states: list[int] = []
        self.num_long = 0

    def run(self, path: Path) -> None:
        """Scan all samples of a tar; tarfile.TarError and OSError pass through."""
        seen: set[str] = set()
        for sample in read_samples(path):
            problem = header_problem(sample, seen, self._options.max_megapixels * 1e6)
            seen.add(sample.key)
            if problem:
                self.dropped.append((readable(sample.key), problem))
                continue
            self._pending.append(sample)
            self._pending_bytes += len(sample.image or b"")
            if len(self._pending) == DECODE_BATCH or self._pending_bytes > DECODE_BYTES:
                self._decode()
        self._decode()

    def _decode(self) -> None:
        texts: list[str] = []
        sizes = decoded_sizes([sample.image or b"" for sample in self._pending], self._options.num_threads)
        for sample, size in zip(self._pending, sizes, strict=True):
            if size is None:
                self.dropped.append((sample.key, "cannot be decoded"))
                continue
            self.usable.append(sample.members)
            self.sizes.append(size)
            self.crcs.append(sample.crcs)
            self.caption_states.append(caption_state(sample.caption))
            if sample.caption is not None and self.caption_states[-1] == USABLE:
                texts.append(caption_text(sample.caption))
        self.num_long += sum(length > CLIP_CONTEXT for length in self._tokenizer.lengths(texts))
        self._pending.clear()
        self._pending_bytes = 0

    def caption_counts(self) -> dict[str, int]:
        """Samples without a usable caption by reason, and captions of more than CLIP's tokens."""
        counts = {reason: self.caption_states.count(state) for state, reason in REASONS.items()}
        return counts | {LONG: self.num_long}


def index_shard(
    name: str, path: Path, stamp: tuple[int, int] | None, options: Options, tokenizer: Tokenizer
) -> tuple[dict[str, FileRecord], dict[str, Any]]:
    """Index one tar. A tar that cannot be read to its end gives no files and a summary that says why."""
    if stamp is None:
        return {}, {"unreadable": f"{path}: not a regular file"}
    scan = ShardScan(options, tokenizer)
    try:
        scan.run(path)
    except (tarfile.TarError, EOFError, OSError) as error:
        return {}, {"unreadable": f"{path}: {error}"}
    if stamp_of(path) != stamp:
        return {}, {"unreadable": f"{path}: it was changed while it was read"}
    sizes_N2 = np.array(scan.sizes, dtype=np.int32).reshape(-1, 2)
    crc_N4 = np.array(scan.crcs, dtype=np.uint32).reshape(-1, NUM_KINDS)
    crc_NK = crc_N4 if crc_N4[:, -1].any() else crc_N4[:, :-1]  # without class numbers as in earlier versions
    folder = options.out
    files = {
        f"{name}.idx": write_atomic(folder / f"{name}.idx", lambda file: file.write(format_idx(scan.usable))),
        f"{name}.sizes.npy": write_array(folder / f"{name}.sizes.npy", sizes_N2),
        f"{name}.crc32.npy": write_array(folder / f"{name}.crc32.npy", crc_NK),
        f"{name}{CAPTIONS_ENDING}": write_array(
            folder / f"{name}{CAPTIONS_ENDING}", np.array(scan.caption_states, dtype=np.uint8)
        ),
    }
    num_captions = scan.caption_states.count(USABLE)
    summary = {"num_images": len(scan.usable), "num_captions": num_captions, "dropped": scan.dropped}
    return files, {**summary, "captions": scan.caption_counts(), "bytes": stamp[0]}


def run(options: Options, context: runner.Context) -> None:
    """Index all shards over all ranks; rank 0 writes the manifest."""
    paths = find_shards(options.shards)
    parameters = options.model_dump(
        mode="json", exclude={"out", "dry_run", "overwrite", "num_threads", "shards", "skip_unreadable_shards"}
    )
    stamps = {name: stamp_of(path) for name, path in paths.items()}
    keys = {name: work_key("index 2", parameters, paths[name], stamp) for name, stamp in stamps.items()}
    parameters["shards"] = work_key(keys)  # other, moved or changed shards make this other work
    wanted = IndexManifest(
        stage="index",
        parameters=parameters,
        inputs={},
        files={},
        versions=library_versions(),
        shards=[],
        num_images=0,
        num_captions=0,
        dropped={},
    )
    if runner.already_done(options, context, IndexManifest, wanted):
        return
    num_bytes = sum(stamp[0] for stamp in stamps.values() if stamp)
    runner.logger.info("index: %d shards, %.1f MB -> %s", len(paths), num_bytes / 1e6, options.out)
    if options.dry_run:
        return
    tokenizer = clip_tokenizer()
    notes = for_each_shard(
        context,
        options.out,
        keys,
        lambda name: index_shard(name, paths[name], stamps[name], options, tokenizer),
        what="index",
        redo=options.overwrite,
    )
    unreadable = [note.summary["unreadable"] for note in notes.values() if "unreadable" in note.summary]
    unreadable = context.group.gather_objects(unreadable)[0]
    if unreadable and not options.skip_unreadable_shards:
        raise UserError(
            f"{len(unreadable)} shards cannot be read to their end: {'; '.join(unreadable[:5])}. "
            "Fetch them again, or leave them out with --skip-unreadable-shards."
        )
    if context.group.is_main:
        write_index_manifest(options, paths, {n: note for n, note in notes.items() if note.files}, wanted, unreadable)
    context.group.barrier()


def write_index_manifest(
    options: Options, paths: dict[str, Path], notes: dict[str, Any], wanted: IndexManifest, unreadable: list[str]
) -> None:
    """Gather the shards' notes into `dropped.json` and `manifest.json`, and say what was dropped."""
    dropped = {name: note.summary["dropped"] for name, note in notes.items() if note.summary["dropped"]}
    reasons = Counter(reason for pairs in dropped.values() for _, reason in pairs)
    files = {name: record for note in notes.values() for name, record in note.files.items()}
    files["dropped.json"] = write_json(options.out / "dropped.json", {"shards": unreadable, "samples": dropped})
    shards = [
        ShardEntry(name=n, path=paths[n], **{k: note.summary[k] for k in ("bytes", "num_images", "num_captions")})
        for n, note in notes.items()
    ]
    captions: Counter[str] = Counter()
    for note in notes.values():
        captions.update(note.summary["captions"])
    num_images = sum(shard.num_images for shard in shards)
    if num_images == 0:
        raise UserError(f"no usable image in {len(shards)} shards: see {options.out / 'dropped.json'}.")
    manifest = wanted.model_copy(
        update={
            "files": files,
            "shards": shards,
            "num_images": num_images,
            "num_captions": sum(note.summary["num_captions"] for note in notes.values()),
            "dropped": dict(reasons),
            "captions": dict(captions),
        }
    )
    write_manifest(options.out, manifest)
    runner.logger.info("index: %d images; dropped: %s", num_images, _told(reasons))
    runner.logger.info("index: %d usable captions; others: %s", manifest.num_captions, _told(captions))


def _told(counts: Counter[str]) -> str:
    """Counts in words, the largest first."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common() if count) or "none"


def main(argv: list[str] | None = None) -> int:
    """Entry of `mlcd index`."""
    return runner.main("index", Options, run, __doc__, argv)
