"""Writes damaged.tar, a shard in img2dataset layout with everything wrong that a crawl brings, and damaged.json.

usage: python tests/data/make_damaged.py

damaged.json is a list with one entry for each sample, in the tar's order: its key, what is wrong with it (null if
nothing is) and whether an index keeps it. It is a list because one key stands in the tar twice.
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
SIDE = 96
HUGE = 60_000  # pixels a side that the patched header claims
START_OF_FRAME = b"\xff\xc0"  # then length (2 bytes), precision (1), height (2), width (2)


@dataclass(frozen=True)
class Sample:
    """One sample: its members by extension, what is wrong with it, and whether it is to be kept."""

    key: str
    members: dict[str, bytes]
    damage: str | None
    is_kept: bool


def picture(seed: int, mode: str = "RGB") -> bytes:
    """A JPEG of coloured waves in `mode`; another picture for each seed."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    frequency, phase = generator.uniform(1, 6, (3, 2)), generator.uniform(0, 6, 3)
    waves = [np.sin(2 * np.pi * (fx * x + fy * y) + p) for (fx, fy), p in zip(frequency, phase, strict=True)]
    pixels = np.round(127.5 + 127.5 * np.stack(waves, axis=-1)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", quality=85)
    return file.getvalue()


def claim_huge(jpeg: bytes) -> bytes:
    """The JPEG with its header's height and width patched to `HUGE`; what follows is untouched."""
    at = jpeg.index(START_OF_FRAME) + 5
    return jpeg[:at] + 2 * HUGE.to_bytes(2, "big") + jpeg[at + 4 :]


def sample(
    number: int,
    damage: str | None = None,
    is_kept: bool = True,
    *,
    key: str | None = None,
    jpeg: bytes | None = None,
    without: str = "",
) -> Sample:
    """Sample `number`: a good one, but for what is said otherwise."""
    key = f"{number:09d}" if key is None else key
    jpeg = picture(number) if jpeg is None else jpeg
    caption = f"coloured waves, number {number}"
    text = json.dumps({"key": key, "caption": caption, "width": SIDE, "height": SIDE})
    members = {"jpg": jpeg, "txt": caption.encode(), "json": text.encode()}
    members.pop(without, None)
    return Sample(key, members, damage, is_kept)


def samples() -> list[Sample]:
    """All samples, in the tar's order; good ones stand between damaged ones."""
    whole = picture(1)
    return [
        sample(0),
        sample(1, "JPEG cut at 60% of its bytes", False, jpeg=whole[: len(whole) * 6 // 10]),
        sample(2, "empty JPEG (0 bytes)", False, jpeg=b""),
        sample(3),
        sample(4, "not an image", False, jpeg=b"<html><body>404 Not Found</body></html>\n"),
        sample(5, "CMYK", True, jpeg=picture(5, "CMYK")),
        sample(6, "greyscale", True, jpeg=picture(6, "L")),
        sample(7, "no caption", True, without="txt"),
        sample(8, "no json", True, without="json"),
        sample(9, "no image", False, without="jpg"),
        sample(10, f"header claims {HUGE} x {HUGE} pixels", False, jpeg=claim_huge(picture(10))),
        sample(11, "key leads out of the folder", False, key="../evil"),
        sample(12),
        sample(13, "key of an earlier sample", False, key=f"{0:09d}"),
        sample(14),
    ]


def write(folder: Path) -> None:
    """Writes damaged.tar and damaged.json into `folder`."""
    with tarfile.open(folder / "damaged.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for item in samples():
            for extension, data in item.members.items():
                info = tarfile.TarInfo(f"{item.key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    rows = [{"key": item.key, "damage": item.damage, "kept": item.is_kept} for item in samples()]
    (folder / "damaged.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    write(HERE)
