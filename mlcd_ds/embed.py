"""Embed every image of an index with a frozen encoder: the space in which images are clustered.

Writes one file a shard, `NAME.npy`: fp16 [n, E], rows of unit length, in index order. Resumed shard by shard; shards
are dealt over the ranks.

  mlcd embed --index runs/laion/index --encoder clip-vit-large-patch14 --out runs/laion/embeddings
  torchrun --nproc_per_node 8 -m mlcd_ds.embed ...       one rank a GPU

The next stage is `mlcd cluster`.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run by path: this folder's names must not shadow top-level packages
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
from pydantic import Field

from mlcd_ds import stage
from mlcd_ds.by_shard import for_each_shard, work_key
from mlcd_ds.clustering.embedding_store import EmbeddingManifest
from mlcd_ds.data.dali import ImageDecoder
from mlcd_ds.data.loader import shard_images
from mlcd_ds.data.shard_index import ShardIndex
from mlcd_ds.encoders import Encoder, load_encoder
from mlcd_ds.errors import UserError
from mlcd_ds.manifest import library_versions, write_atomic, write_manifest


class Options(stage.StageOptions):
    """Options of `mlcd embed`."""

    index: Path = Field(description="folder of `mlcd index`")
    encoder: str = Field(description="a Hugging Face folder, or a name such as efficientnet-lite0, and [@SIZE]")
    batch_size: int = Field(64, ge=1, description="images a forward pass, per rank")
    num_threads: int = Field(2, ge=1, description="decoding threads of a rank")


def embed_shard(encoder: Encoder, decoder: ImageDecoder, index: ShardIndex, shard: int) -> np.ndarray:
    """Unit-length embeddings fp16 [n, E] of one shard that is not empty."""
    blocks = []
    with torch.inference_mode():
        for images_B3SS in shard_images(index, shard, decoder):
            emb_BE = torch.nn.functional.normalize(encoder.encode(images_B3SS).float(), dim=1)
            blocks.append(emb_BE.to(torch.float16).cpu().numpy())
    emb_NE = np.concatenate(blocks)
    bad = np.flatnonzero(~np.isfinite(emb_NE).all(axis=1))
    if len(bad):
        key = index.samples(shard).keys[bad[0]]
        raise UserError(f"{index.shards[shard].path}, key {key}: encoder {encoder.name} gives NaN or infinity.")
    return emb_NE


def run(options: Options, context: stage.Context) -> None:
    """Embed all shards over all ranks; rank 0 writes the manifest."""
    index = ShardIndex(options.index)
    index.check_shards(context.group.rank, context.group.size)
    encoder = load_encoder(options.encoder)
    weights = encoder.fingerprint()
    wanted = EmbeddingManifest(
        stage="embed",
        parameters={"encoder": encoder.name, "weights_sha256": weights, "pixels": asdict(encoder.pixels)},
        inputs={"index": index.manifest.fingerprint},
        files={},
        versions=library_versions(),
        num_images=index.num_images,
        dim=0,
        shards=[],
    )
    if stage.already_done(options, context, EmbeddingManifest, wanted):
        return
    stage.logger.info("embed: %d images with %s -> %s", index.num_images, encoder.name, options.out)
    if options.dry_run:
        return
    encoder.to(context.device)
    decoder = ImageDecoder(options.batch_size, encoder.pixels, context.device, options.num_threads)
    numbers = {entry.name: number for number, entry in enumerate(index.shards)}

    def work(name: str) -> tuple[dict, dict]:
        emb_NE = embed_shard(encoder, decoder, index, numbers[name])
        record = write_atomic(options.out / f"{name}.npy", lambda file: np.save(file, emb_NE))
        return {f"{name}.npy": record}, {"dim": emb_NE.shape[1]}

    key = work_key("embed", wanted.parameters, wanted.inputs)
    keys = {name: key for name, number in numbers.items() if index.counts[number]}
    notes = for_each_shard(context, options.out, keys, work, "embed", redo=options.overwrite)
    if context.group.is_main:
        manifest = wanted.model_copy(
            update={
                "files": {name: record for note in notes.values() for name, record in note.files.items()},
                "dim": next(iter(notes.values())).summary["dim"],
                "shards": [(entry.name, entry.num_images) for entry in index.shards if entry.num_images],
            }
        )
        write_manifest(options.out, manifest)
        stage.logger.info("embed: %d x %d", manifest.num_images, manifest.dim)
    context.group.barrier()


def main(argv: list[str] | None = None) -> int:
    """Entry of `mlcd embed` and `python -m mlcd_ds.embed`."""
    return stage.main("embed", Options, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
