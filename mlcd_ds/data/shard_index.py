"""The index of a set of WebDataset shards: which samples there are, and where their members lie in the tars.

`mlcd index` writes, per shard, a DALI index (`NAME.idx`, version 1.2: one line a sample, `ext offset bytes name` for
each member), the pixel sizes of the images (`NAME.sizes.npy`), the CRC-32 of what is read later (`NAME.crc32.npy`:
image, caption, metadata, and the class number where samples have one), and which captions can be used
(`NAME.captions.npy`). Unusable samples are in none of them. A sample's row in these files is its identity: embeddings
and labels are stored in the same order.
"""

from __future__ import annotations

import functools
import os
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlcd_ds.artefacts.manifest import (
    Manifest,
    output_array,
    output_path,
    output_record,
    read_manifest,
    remake,
    shards_problem,
)
from mlcd_ds.artefacts.readers import decoding, read_bytes
from mlcd_ds.artefacts.typed import Frozen
from mlcd_ds.data.captions import USABLE
from mlcd_ds.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
IDX_VERSION = "v1.2"
NUM_KINDS = 4  # of members that are read: image, caption, metadata, class number
TAR_BLOCK = 512
MAX_HEADER_NAME = 100  # longer names lie in an extended header


class ShardEntry(Frozen):
    """One tar: `name` is unique in the set and names its files in every stage's folder; `path` is where it lies."""

    name: str
    path: Path
    bytes: int
    num_images: int
    num_captions: int | None = None  # that can be used; none in indexes of earlier versions


ENDINGS = (".idx", ".sizes.npy", ".crc32.npy")  # of a shard's files
CAPTIONS_ENDING = ".captions.npy"


class IndexManifest(Manifest):
    """Manifest of `mlcd index`. `dropped` counts the samples left out, per reason; `captions` those kept without a
    usable caption, per reason, and the captions that CLIP would cut. Earlier versions did not look at captions."""

    shards: list[ShardEntry]
    num_images: int
    num_captions: int
    dropped: dict[str, int]
    captions: dict[str, int] | None = None

    def problem(self) -> str | None:
        """Shards that do not add up."""
        shards = [(shard.name, shard.num_images) for shard in self.shards]
        endings = ENDINGS if self.captions is None else (*ENDINGS, CAPTIONS_ENDING)
        problem = shards_problem(shards, self.num_images, self.files, endings)
        num_captions = sum(shard.num_captions or 0 for shard in self.shards)
        if problem is None and self.captions is not None and num_captions != self.num_captions:
            return f"its shards do not add up to the {self.num_captions} captions that it names"
        return problem


@dataclass(frozen=True)
class Span:
    """One kind of member, a row a sample: offset in the tar, size, CRC-32; offset -1 where there is none."""

    offset_N: np.ndarray
    bytes_N: np.ndarray
    crc_N: np.ndarray


@dataclass(frozen=True)
class Member:
    """A regular file inside a tar."""

    extension: str
    offset: int
    bytes: int
    name: str


def format_idx(samples: list[list[Member]]) -> bytes:
    """DALI's index of a shard's samples."""
    lines = [f"{IDX_VERSION} {len(samples)}"]
    lines += [" ".join(f"{m.extension} {m.offset} {m.bytes} {m.name}" for m in sample) for sample in samples]
    return ("\n".join(lines) + "\n").encode()


@dataclass(frozen=True)
class ShardSamples:
    """The samples of one shard, in index order. `sizes_N2` holds height and width in pixels."""

    keys: list[str]
    image: Span
    caption: Span
    metadata: Span
    class_number: Span
    sizes_N2: np.ndarray


def member_kind(extension: str) -> int | None:
    """0 for an image, 1 for a caption, 2 for metadata, 3 for a class number, None for what is never read."""
    return 0 if extension in IMAGE_EXTENSIONS else {"txt": 1, "json": 2, "cls": 3}.get(extension)


def parse_idx(content: bytes, crc_NK: np.ndarray) -> tuple[list[str], Span, Span, Span, Span]:
    """Read a `.idx`: keys and the spans of images, captions (.txt), metadata (.json) and class numbers (.cls).

    Without a column of checksums for class numbers, as where no sample has one, they count as missing. ValueError: it
    is damaged.
    """
    header, *lines = content.decode().splitlines()
    num_kinds = crc_NK.shape[1]
    if num_kinds not in (NUM_KINDS - 1, NUM_KINDS):
        raise ValueError(f"its checksums are of {num_kinds} kinds of members")
    if header != f"{IDX_VERSION} {len(lines)}" or len(lines) != len(crc_NK):
        raise ValueError(f"it has {len(lines)} lines and says {header[:50]!r}, the manifest {len(crc_NK)} samples")
    keys: list[str] = []
    rows = np.full((NUM_KINDS, len(lines), 2), -1, dtype=np.int64)
    for row, line in enumerate(lines):
        members = parse_line(line)
        for member in members:
            kind = member_kind(member.extension)
            if (
                kind is not None and kind < num_kinds and rows[kind, row, 0] < 0
            ):  # of several images the first, as `mlcd index` measured
                rows[kind, row] = member.offset, member.bytes
        keys.append(split_name(members[0].name)[0])
    crc_N4 = np.pad(crc_NK, ((0, 0), (0, NUM_KINDS - num_kinds)))
    image, caption, metadata, number = (Span(rows[k, :, 0], rows[k, :, 1], crc_N4[:, k]) for k in range(NUM_KINDS))
    return keys, image, caption, metadata, number


def split_name(name: str) -> tuple[str, str]:
    """A member's key and lower-case extension, at the first dot of its base name, as WebDataset does."""
    dot = name.find(".", name.rfind("/") + 1)
    return (name[:dot], name[dot + 1 :].lower()) if dot >= 0 else (name, "")


def parse_line(line: str) -> list[Member]:
    """The members of one sample, from its line in a `.idx`."""
    words = line.split(" ")
    fields = zip(words[0::4], words[1::4], words[2::4], words[3::4], strict=True)
    return [Member(extension, int(offset), int(size), name) for extension, offset, size, name in fields]


def outer_images(path: Path) -> list[Member]:
    """The images of the first and of the last sample in a `.idx`, read from its ends; none when it has no sample.

    ValueError: it is damaged.
    """
    with open(path, "rb") as file:
        file.readline()
        first = file.readline()
        if not first:
            return []
        size = os.fstat(file.fileno()).st_size
        window, tail = len(first), b""
        while b"\n" not in tail and window < size:  # the last line is about as long as the first
            window = min(2 * window, size)
            tail = os.pread(file.fileno(), window, size - window).rstrip(b"\n")
    images = []
    for line in (first.rstrip(b"\n"), tail.rpartition(b"\n")[2]):
        found = [member for member in parse_line(line.decode()) if member_kind(member.extension) == 0]
        if not found or found[0].offset < TAR_BLOCK:
            raise ValueError(f"no image in {line[:80]!r}")
        images.append(found[0])
    return images


def has_member(descriptor: int, member: Member) -> bool:
    """Whether the tar has a header with that name and size where the index says. Names that a plain header cannot hold
    (long or not ASCII) are taken on trust."""
    try:
        block = os.pread(descriptor, TAR_BLOCK, member.offset - TAR_BLOCK)
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    is_plain = len(member.name) <= MAX_HEADER_NAME and member.name.isascii()
    return header.size == member.bytes and (header.name == member.name or not is_plain)


class ShardIndex:
    """An indexed shard set. Sample tables are read shard by shard, when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder, IndexManifest, "index")
        self.shards = self.manifest.shards
        self.num_images = self.manifest.num_images
        self.counts = np.array([shard.num_images for shard in self.shards], dtype=np.int64)
        self.samples = functools.lru_cache(maxsize=512)(self._read_samples)
        self.captioned_rows = functools.lru_cache(maxsize=512)(self._read_captioned_rows)

    def _read_samples(self, shard: int) -> ShardSamples:
        entry = self.shards[shard]
        name, count = entry.name, entry.num_images
        sizes_N2 = output_array(self.folder, self.manifest, f"{name}.sizes.npy", np.int32, (count, 2))
        crc_NK = output_array(self.folder, self.manifest, f"{name}.crc32.npy", np.uint32, (count, None))
        record, fix = output_record(self.folder, self.manifest, f"{name}.idx"), remake("index", self.folder)
        content = read_bytes(self.folder / f"{name}.idx", fix, record)
        with decoding(self.folder / f"{name}.idx", fix):
            return ShardSamples(*parse_idx(content, crc_NK), sizes_N2)

    def caption_counts(self) -> np.ndarray:
        """int64 [number of shards]: samples with a usable caption. UserError where the index does not know them."""
        if self.manifest.captions is None:
            raise UserError(
                f"{self.folder} was made by an earlier version, which did not look at captions: run `mlcd index "
                f"--overwrite --out {self.folder}` and the stages after it."
            )
        if not self.manifest.num_captions:
            told = ", ".join(f"{count} {reason}" for reason, count in self.manifest.captions.items() if count)
            raise UserError(
                f"{self.folder} indexes no usable caption ({told}): captions are the samples' .txt members, in UTF-8."
            )
        return np.array([shard.num_captions for shard in self.shards], dtype=np.int64)

    def _read_captioned_rows(self, shard: int) -> np.ndarray:
        """int64: rows of a shard's samples with a usable caption, ascending."""
        entry = self.shards[shard]
        name = f"{entry.name}{CAPTIONS_ENDING}"
        states_N = output_array(self.folder, self.manifest, name, np.uint8, (entry.num_images,))
        rows = np.flatnonzero(states_N == USABLE)
        if len(rows) != entry.num_captions:
            raise UserError(
                f"{self.folder / name} has {len(rows)} usable captions, the manifest {entry.num_captions}. "
                f"{remake('index', self.folder)}"
            )
        return rows

    def check_shards(self, rank: int = 0, num_ranks: int = 1) -> None:
        """Compare tars with the index: their sizes, and the headers of the first and the last indexed image.

        Each rank looks at its share. UserError names the first tar that is missing or was changed.
        """
        for entry in self.shards[rank::num_ranks]:
            fix = f"it was changed since. Run `mlcd index --overwrite --out {self.folder}` and the stages after it."
            with decoding(entry.path, f"{self.folder} indexes it: put it back or index again."):
                size = entry.path.stat().st_size
            if size != entry.bytes:
                raise UserError(f"{entry.path} has {size} bytes, {self.folder} indexed {entry.bytes}: {fix}")
            members = self._outer_images(entry)
            with decoding(entry.path, "Let it be read, or index again."), open(entry.path, "rb") as file:
                lost = next((member for member in members if not has_member(file.fileno(), member)), None)
            if lost:
                raise UserError(f"{entry.path} has no {lost.name} at byte {lost.offset}, as indexed: {fix}")

    def _outer_images(self, entry: ShardEntry) -> list[Member]:
        """As `outer_images`; a damaged index is a UserError. Its checksum is compared only where it looks wrong."""
        name = f"{entry.name}.idx"
        try:
            return outer_images(self.folder / name)
        except (OSError, ValueError) as error:
            path = output_path(self.folder, self.manifest, name)
            raise UserError(f"{path} is no index: {error}. {remake('index', self.folder)}") from None


class ShardReader:
    """Reads members of the tars by offset; keeps `max_open` tars open. Not shared between threads.

    What is read is compared with the CRC-32 of the index: UserError where a shard was changed since.
    """

    def __init__(self, index: ShardIndex, max_open: int = 256) -> None:
        self._index = index
        self._max_open = max_open
        self._open: dict[int, int] = {}

    def read(self, shard: int, span: Span, row: int) -> bytes:
        """Bytes of one member; empty when the sample has none."""
        offset, size = int(span.offset_N[row]), int(span.bytes_N[row])
        if offset < 0:
            return b""
        path = self._index.shards[shard].path
        with decoding(path, "Put it back, or index the shards again."):
            content = os.pread(self._descriptor(shard), size, offset)
        if len(content) != size or zlib.crc32(content) != span.crc_N[row]:
            raise UserError(
                f"{path}: the {size} bytes at offset {offset}, key {self._index.samples(shard).keys[row]}, are not "
                f"those that were indexed: the shard was changed. Run `mlcd index --overwrite --out "
                f"{self._index.folder}` and the stages after it."
            )
        return content

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            if len(self._open) >= self._max_open:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[shard] = os.open(self._index.shards[shard].path, os.O_RDONLY)
        return self._open[shard]

    def close(self) -> None:
        """Close all tars."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()
