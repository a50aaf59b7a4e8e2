"""The demo set's raw material: packages fetched by name and version, turned into square captioned pictures."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import subprocess
import sys
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageChops
from tqdm import tqdm

log = logging.getLogger(__name__)

MAX_PIXELS = 40_000_000  # a few clip-art PNGs have 100-600 megapixels
MIN_SIDE = 24
MIN_CONTRAST = 2.0  # standard deviation of the grey levels; below it the picture is an empty page
FINGERPRINT_SIDE = 32
MARGIN = 1 / 32  # white around the drawing, as a share of its longer side
BACKGROUND_LEVELS = 12  # a pixel this near to white, of 255, is page


@dataclass(frozen=True)
class Package:
    """One pinned archive: what to ask the package client for, and the bytes to expect."""

    name: str
    version: str
    file_name: str
    sha256: str


CLIPART_PNG = Package(
    "openclipart-png",
    "1:0.18+dfsg-19",
    "openclipart-png_1%3a0.18+dfsg-19_all.deb",
    "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
)
CLIPART_SVG = Package(
    "openclipart-svg",
    "1:0.18+dfsg-19",
    "openclipart-svg_1%3a0.18+dfsg-19_all.deb",
    "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
)
FLUENT = Package(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
)
EMOJIBASE = Package(
    "emojibase-data",
    "17.0.0",
    "emojibase-data-17.0.0.tgz",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
)
PACKAGES = (CLIPART_PNG, CLIPART_SVG, FLUENT, EMOJIBASE)

CLIPART_SKIP = (  # interface icons, bare shapes, flags, playing cards: hundreds of near-copies, or nothing to see
    "computer/buttons",
    "computer/icons",
    "recreation/games/cards",
    "shapes/",
    "signs_and_symbols/flags",
    "signs_and_symbols/led",
    "signs_and_symbols/map_symbols",
    "special/",
    "unsorted/",
)
CLIPART_UNLABELLED = ("aiga", "roadsigns")  # pictograms filed under people and transport
CLIPART_CLASS = {  # the longest folder that fits wins
    "animals": "animal",
    "buildings": "building",
    "computer": "electronics",
    "electronics": "electronics",
    "food": "food",
    "people": "person",
    "plants": "plant",
    "recreation/music": "music",
    "recreation/sports": "sport",
    "tools": "tool",
    "transportation": "transport",
}
EMOJI_CLASS = {  # a subgroup's name or the beginning of it, else the group's
    "animal": "animal",
    "clothing": "clothes",
    "computer": "electronics",
    "food-drink": "food",
    "musical-instrument": "music",
    "person": "person",
    "person-fantasy": "person",
    "person-gesture": "person",
    "person-role": "person",
    "phone": "electronics",
    "place-build": "building",
    "plant": "plant",
    "sport": "sport",
    "tool": "tool",
    "transport": "transport",
}
EMOJI_CLASS_PREFIXES = ("animal", "place-build", "plant", "transport")
EMOJI_UNLABELLED = "transport-sign"  # pictograms: cash machine, wheelchair, restroom


@dataclass(frozen=True)
class Picture:
    """One square RGB picture on white with what its source says about it."""

    source: str
    origin: str
    caption: str
    tags: tuple[str, ...]
    class_name: str | None
    license: str
    pixels: np.ndarray  # uint8 [side, side, 3]


@dataclass(frozen=True)
class Candidate:
    """A picture not yet decoded."""

    source: str
    path: Path
    origin: str
    caption: str
    tags: tuple[str, ...]
    class_name: str | None
    license: str


def fetch(package: Package, work: Path) -> Path:
    """Downloads `package` into `work` with its own client, unless it is there; returns the verified archive."""
    archive = work / package.file_name
    if not archive.exists():
        is_deb = archive.suffix == ".deb"
        command = (
            ["apt-get", "download", f"{package.name}={package.version}"]
            if is_deb
            else ["npm", "pack", "--loglevel=error", f"{package.name}@{package.version}"]
        )
        log.info("fetching: %s", " ".join(command))
        if subprocess.run(command, cwd=work, stdout=sys.stderr).returncode:
            hint = "; is the package list fresh (apt-get update)?" if is_deb else ""
            raise ValueError(f"'{' '.join(command)}' failed{hint}")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise ValueError(f"{archive}: sha256 is {digest}, expected {package.sha256}: remove the file and run again")
    return archive


def unpack(archive: Path, folder: Path) -> Path:
    """Unpacks a .deb or an npm .tgz into `folder`, unless that was done; a marker file is written last."""
    marker = folder / f".{archive.name}.done"
    if not marker.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if archive.suffix == ".deb":
            subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True)
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
        marker.touch()
    return folder


def fingerprint(pixels: np.ndarray) -> bytes:
    """The picture at 32 x 32 and 4 bits a channel: equal for exact repeats, whatever their first size."""
    small = Image.fromarray(pixels).resize((FINGERPRINT_SIDE, FINGERPRINT_SIDE), Image.Resampling.BOX)
    return (np.asarray(small) >> 4).tobytes()


def load_square(path: Path, side: int) -> np.ndarray | None:
    """The drawing cut from its page and centred on a white square, as uint8 [side, side, 3].

    None if the file is unreadable, tiny, huge or blank. The cut matters: some drawings are a dot on a whole page.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                if min(file.size) < MIN_SIDE or file.width * file.height > MAX_PIXELS:
                    return None
                image = file.convert("RGBA")
    except (OSError, ValueError, Image.DecompressionBombWarning, Image.DecompressionBombError):
        return None
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image)
    drawing = page.convert("RGB")
    ink = ImageChops.invert(drawing).convert("L").point(lambda level: 255 * (level > BACKGROUND_LEVELS))
    box = ink.getbbox()
    if box is None or min(box[2] - box[0], box[3] - box[1]) < MIN_SIDE // 2:
        return None
    drawing = drawing.crop(box)
    scale = side * (1 - 2 * MARGIN) / max(drawing.size)
    drawing = drawing.resize([max(1, round(n * scale)) for n in drawing.size], Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(drawing, ((side - drawing.width) // 2, (side - drawing.height) // 2))
    pixels = np.asarray(canvas)
    return None if pixels.mean(2).std() < MIN_CONTRAST else pixels


def clipart_metadata(svg: Path) -> tuple[str, tuple[str, ...], bool] | None:
    """Title, tags and whether the picture's own metadata place it in the public domain; None without metadata.

    None too for a drawing that links to a bitmap elsewhere: it was rendered as "Linked image not found".
    """
    try:
        elements = list(ElementTree.parse(svg).getroot().iter())
    except ElementTree.ParseError:
        return None
    work = next((e for e in elements if e.tag.endswith("}Work")), None)
    links = [v for e in elements if e.tag.endswith("}image") for k, v in e.attrib.items() if k.endswith("href")]
    if work is None or not all(link.startswith("data:") for link in links):
        return None
    title = work.findtext("{http://purl.org/dc/elements/1.1/}title") or ""
    tags = [e.text.strip() for e in work.iter() if e.tag.endswith("}li") and e.text and not e.text.startswith("hash")]
    licenses = [v for e in work.iter() if e.tag.endswith("}license") for v in e.attrib.values()]
    is_public = bool(licenses) and all("publicdomain" in v.lower().replace(" ", "") for v in licenses)
    title = " ".join(re.sub(r"\([^()]*@[^()]*\)", "", title).split())  # one title holds its author's address
    return title, tuple(dict.fromkeys(t for t in tags if t)), is_public


def clipart_class(relative: str) -> str | None:
    """The class of a clip-art file by its folder, None for those that are in no class."""
    if any(word in relative for word in CLIPART_UNLABELLED):
        return None
    folders = [folder for folder in CLIPART_CLASS if relative.startswith(folder + "/")]
    return CLIPART_CLASS[max(folders, key=len)] if folders else None


def clipart_candidates(deb_root: Path) -> Iterator[Candidate]:
    """Clip art with a title or tags, in path order."""
    png_root = deb_root / "usr/share/openclipart/png"
    svg_root = deb_root / "usr/share/openclipart/svg"
    if not png_root.is_dir() or not svg_root.is_dir():
        raise ValueError(f"--clipart-root {deb_root}: no usr/share/openclipart/png and svg in it")
    for path in sorted(png_root.rglob("*.png")):
        relative = path.relative_to(png_root).as_posix()
        svg = svg_root / Path(relative).with_suffix(".svg")
        if relative.startswith(CLIPART_SKIP) or not svg.exists():
            continue
        title, tags, is_public = clipart_metadata(svg) or ("", (), False)
        if is_public and (title or tags):
            name = clipart_class(relative)
            yield Candidate("clipart", path, relative, title or tags[0], tags, name, "public domain")


def emoji_class(group: str, subgroup: str) -> str | None:
    """The class of an emoji by Unicode's group and subgroup, None for those that are in no class."""
    if subgroup == EMOJI_UNLABELLED:
        return None
    prefix = next((p for p in EMOJI_CLASS_PREFIXES if subgroup.startswith(p)), subgroup)
    return EMOJI_CLASS.get(group) or EMOJI_CLASS.get(prefix)


def emoji_candidates(assets: Path, emojibase: Path) -> Iterator[Candidate]:
    """Emoji that have a label, in file-name order; emojibase nests skin tones, so that only the plain one is here."""
    if not any(assets.glob("*.webp")):
        raise ValueError(f"--fluent {assets}: no .webp files in it")
    if not (emojibase / "en/data.json").exists():
        raise ValueError(f"--emojibase {emojibase}: no en/data.json in it")

    def plain(code: str) -> str:
        return code.lower().replace("-fe0f", "")

    names = json.loads((emojibase / "meta/groups.json").read_text())
    entries = {plain(e["hexcode"]): e for e in json.loads((emojibase / "en/data.json").read_text())}
    for path in sorted(assets.glob("*.webp")):
        entry = entries.get(plain(path.stem))
        if entry is None or "group" not in entry:
            continue
        group, subgroup = names["groups"][str(entry["group"])], names["subgroups"][str(entry["subgroup"])]
        tags = tuple(dict.fromkeys([*entry.get("tags", []), subgroup, group]))
        yield Candidate("emoji", path, path.name, entry["label"], tags, emoji_class(group, subgroup), "MIT")


def collect(candidates: list[Candidate], side: int) -> list[Picture]:
    """Decodes all candidates in order and drops unreadable ones and exact repeats of an earlier one."""
    pictures: list[Picture] = []
    seen: set[bytes] = set()
    for item in tqdm(candidates, desc="decode", unit="img", disable=not sys.stderr.isatty()):
        pixels = load_square(item.path, side)
        if pixels is None or (key := fingerprint(pixels)) in seen:
            continue
        seen.add(key)
        pictures.append(
            Picture(item.source, item.origin, item.caption, item.tags, item.class_name, item.license, pixels)
        )
    return name_series(pictures)


def name_series(pictures: list[Picture], min_repeats: int = 3) -> list[Picture]:
    """A title shared by a whole series says nothing about one picture: its caption becomes the file's own words."""
    titles = Counter(p.caption.lower() for p in pictures if p.source == "clipart")

    def caption(p: Picture) -> str:
        if p.source != "clipart" or titles[p.caption.lower()] < min_repeats:
            return p.caption
        return re.sub(r"[_\d]+", " ", Path(p.origin).stem).strip() or p.caption

    return [replace(p, caption=caption(p)) for p in pictures]
