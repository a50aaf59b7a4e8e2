"""Embed every image of an index with a frozen encoder: the space in which images are clustered.

With a CLIP model --features joint clusters images and captions together: the mean of both, of unit length each. With
--features text --encoder may also be the folder of a language model (BERT, RoBERTa): its mean over a caption's tokens.

Writes one file a shard, `NAME.npy`: fp16 [n, E], rows of unit length, in index order. Resumed shard by shard; shards
are dealt over the ranks.

  mlcd embed --index runs/laion/index --encoder clip-vit-large-patch14 --out runs/laion/embeddings
  torchrun --nproc_per_node 8 -m mlcd_ds embed ...       one rank a GPU

The next stage is `mlcd cluster`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from mlcd_ds.artefacts.files import write_array
from mlcd_ds.artefacts.manifest import library_versions, write_manifest
from mlcd_ds.artefacts.typed import MAX_BATCH, MAX_THREADS
from mlcd_ds.clustering.embedding_store import EmbeddingManifest
from mlcd_ds.data.captions import USABLE, caption_state, caption_text
from mlcd_ds.data.dali import EvaluationDecoder
from mlcd_ds.data.loader import shard_images
from mlcd_ds.data.shard_index import ShardIndex, ShardReader
from mlcd_ds.encoders.base import Encoder, TextEncoder
from mlcd_ds.encoders.huggingface import is_language_model, load_text_encoder
from mlcd_ds.encoders.registry import load_encoder
from mlcd_ds.errors import UserError
from mlcd_ds.stages import runner
from mlcd_ds.stages.per_shard import for_each_shard, work_key


class Options(runner.StageOptions):
    """Options of `mlcd embed`."""

    index: Path = Field(description="folder of `mlcd index`")
    encoder: str = Field(description="a Hugging Face folder, or a name such as efficientnet-lite0, and [@SIZE]")
    features: Literal["image", "text", "joint"] = Field(
        "image", description="of a CLIP model also text (the captions) or joint (their mean; images without one alone)"
    )
    batch_size: int = Field(64, ge=1, le=MAX_BATCH, description="images a forward pass, per rank")
    num_threads: int = Field(2, ge=1, le=MAX_THREADS, description="decoding threads of a rank")


def embed_shard(encoder: Encoder, decoder: EvaluationDecoder, index: ShardIndex, shard: int) -> np.ndarray:
    """Unit-length embeddings fp16 [n, E] of one shard that is not empty."""
    blocks = []
    with torch.inference_mode():
        for images_B3SS in shard_images(index, shard, decoder):
            emb_BE = torch.nn.functional.normalize(encoder.encode(images_B3SS).float(), dim=1)
            blocks.append(emb_BE.to(torch.float16).cpu().numpy())
    return np.concatenate(blocks)


def embed_captions(texts: TextEncoder, index: ShardIndex, shard: int, batch_size: int) -> np.ndarray:
    """Unit-length embeddings fp16 [n, E] of a shard's captions; zero rows where a sample has no usable one."""
    samples, reader = index.samples(shard), ShardReader(index)
    rows = range(len(samples.keys))
    members = [reader.read(shard, samples.caption, row) for row in rows]
    reader.close()
    captions = [caption_text(member) if caption_state(member) == USABLE else "" for member in members]
    blocks = []
    with torch.inference_mode():
        for begin in range(0, len(captions), batch_size):
            emb_BE = torch.nn.functional.normalize(texts.encode(captions[begin : begin + batch_size]).float(), dim=1)
            blocks.append(emb_BE.to(torch.float16).cpu().numpy())
    return np.concatenate(blocks) * np.array([bool(caption) for caption in captions])[:, None]


def joined(images_NE: np.ndarray, texts_NE: np.ndarray) -> np.ndarray:
    """fp16 [n, E]: the mean of image and caption, at unit length; the image alone where there is no caption."""
    sums_NE = images_NE.astype(np.float32) + texts_NE.astype(np.float32)
    return (sums_NE / np.linalg.norm(sums_NE, axis=1, keepdims=True)).astype(np.float16)


def check_finite(emb_NE: np.ndarray, encoder: str, index: ShardIndex, shard: int) -> None:
    """UserError naming the first image whose embedding is not finite."""
    bad = np.flatnonzero(~np.isfinite(emb_NE).all(axis=1))
    if len(bad):
        key = index.samples(shard).keys[bad[0]]
        raise UserError(f"{index.shards[shard].path}, key {key}: encoder {encoder} gives NaN or infinity.")


def run(options: Options, context: runner.Context) -> None:
    """Embed all shards over all ranks; rank 0 writes the manifest."""
    index = ShardIndex(options.index)
    index.check_shards(context.group.rank, context.group.size)
    has_no_images = options.features == "text" and is_language_model(Path(options.encoder))
    encoder = None if has_no_images else load_encoder(options.encoder)
    texts = None if options.features == "image" else load_text_encoder(Path(options.encoder))
    name = encoder.name if encoder else Path(options.encoder).resolve().name
    parameters: dict[str, Any] = {"encoder": name}
    if encoder:
        parameters |= {"weights_sha256": encoder.fingerprint(), "pixels": asdict(encoder.pixels)}
    if texts:
        parameters |= {"features": options.features, "text_weights_sha256": texts.fingerprint()}
    wanted = EmbeddingManifest(
        stage="embed",
        parameters=parameters,
        inputs={"index": index.manifest.fingerprint},
        files={},
        versions=library_versions(),
        num_images=index.num_images,
        dim=0,
        shards=[],
    )
    if runner.already_done(options, context, EmbeddingManifest, wanted):
        return
    runner.logger.info("embed: %d images with %s -> %s", index.num_images, name, options.out)
    if options.dry_run:
        return
    numbers = {entry.name: number for number, entry in enumerate(index.shards)}
    if encoder and options.features != "text":
        encoder.to(context.device)
        decoder = EvaluationDecoder(options.batch_size, encoder.pixels, context.device, options.num_threads)
    if texts:
        texts.network.to(context.device)

    def embed_images(shard: int) -> np.ndarray:
        assert encoder
        return embed_shard(encoder, decoder, index, shard)

    def embed(shard: int) -> np.ndarray:
        if texts is None:
            return embed_images(shard)
        texts_NE = embed_captions(texts, index, shard, options.batch_size)
        if options.features == "joint":
            return joined(embed_images(shard), texts_NE)
        bare = np.flatnonzero(~texts_NE.any(axis=1))
        if len(bare):
            raise UserError(
                f"{index.shards[shard].path}, key {index.samples(shard).keys[bare[0]]} has no usable caption: "
                "--features joint takes the image alone there; or leave the sample out of the shards."
            )
        return texts_NE

    def work(shard: str) -> tuple[dict, dict]:
        emb_NE = embed(numbers[shard])
        check_finite(emb_NE, name, index, numbers[shard])
        record = write_array(options.out / f"{shard}.npy", emb_NE)
        return {f"{shard}.npy": record}, {"dim": emb_NE.shape[1]}

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
        runner.logger.info("embed: %d x %d", manifest.num_images, manifest.dim)
    context.group.barrier()


def main(argv: list[str] | None = None) -> int:
    """Entry of `mlcd embed`."""
    return runner.main("embed", Options, run, __doc__, argv)
