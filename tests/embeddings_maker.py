"""Embedding folders made for tests, as `mlcd embed` would leave them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mlcd_ds.artefacts.files import record_of
from mlcd_ds.artefacts.manifest import write_manifest
from mlcd_ds.clustering.embedding_store import EmbeddingManifest, EmbeddingStore


def blobs(counts: tuple[int, ...], dim: int, num_blobs: int, seed: int = 0) -> list[np.ndarray]:
    """fp16 unit rows [n, E] of each shard: overlapping clouds around random directions, mixed over the shards."""
    generator = np.random.default_rng(seed)
    middles = generator.standard_normal((num_blobs, dim))
    number = sum(counts)
    rows = middles[generator.integers(num_blobs, size=number)] + 0.7 * generator.standard_normal((number, dim))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    return np.split(rows, np.cumsum(counts)[:-1])


def write_embeddings(folder: Path, shards: list[np.ndarray], index: str = "of an index") -> None:
    """Shards `00000`, `00001`, ... and their manifest. Empty ones have no file, as in `mlcd embed`."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {f"{number:05d}": rows for number, rows in enumerate(shards) if len(rows)}
    for name, rows in names.items():
        np.save(folder / f"{name}.npy", rows)
    manifest = EmbeddingManifest(
        stage="embed",
        parameters={},
        inputs={"index": index},
        files={f"{name}.npy": record_of(folder / f"{name}.npy") for name in names},
        versions={},
        num_images=sum(map(len, shards)),
        dim=shards[0].shape[1],
        shards=[(name, len(rows)) for name, rows in names.items()],
    )
    write_manifest(folder, manifest)


def all_rows_of(folder: Path) -> np.ndarray:
    """All rows, as stored, in float64."""
    return np.concatenate([rows.double().numpy() for _, rows in EmbeddingStore(folder).blocks(1000)])
