"""Learn a small byte-pair encoding from the captions of an index: a tokenizer for text towers of small runs.

Writes tokenizer.json and tokenizer_config.json, a folder that transformers reads too. Large runs take CLIP's own
vocabulary (data.tokenizer=clip, the default), and so can be compared with what is published.

  mlcd tokenizer --index runs/demo/index/train --vocab-size 2048 --out runs/demo-text/tokenizer

`mlcd train` takes the folder as data.tokenizer; it says which text.vocab_size and text.end_token belong to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from mlcd_ds.artefacts.files import write_atomic, write_json
from mlcd_ds.artefacts.manifest import Manifest, library_versions, write_manifest
from mlcd_ds.data.captions import caption_text
from mlcd_ds.data.shard_index import ShardIndex, ShardReader
from mlcd_ds.data.tokenizers import TOKENIZER_NAME, tokenizer_config, train_tokenizer
from mlcd_ds.stages import runner

MAX_CAPTIONS = 2_000_000  # a vocabulary of this size changes little with more


class Options(runner.StageOptions):
    """Options of `mlcd tokenizer`."""

    index: Path = Field(description="folder of `mlcd index`")
    vocab_size: int = Field(
        2048, ge=300, le=2**17, description="tokens at most: the 256 bytes, two marks, and what is learned"
    )


class TokenizerManifest(Manifest):
    """Manifest of `mlcd tokenizer`."""

    vocab_size: int
    end_token: int


def captions(index: ShardIndex, context: runner.Context) -> Iterator[str]:
    """The usable captions, of so many shards as hold enough of them."""
    reader, taken = ShardReader(index), 0
    counts = index.caption_counts()
    num_shards = len(index.shards)
    for shard in context.progress(range(num_shards), total=num_shards, unit="shard", what="tokenizer"):
        if taken >= MAX_CAPTIONS or not counts[shard]:
            continue
        samples = index.samples(shard)
        for row in index.captioned_rows(shard):
            yield caption_text(reader.read(shard, samples.caption, int(row)))
        taken += int(counts[shard])
    reader.close()


def run(options: Options, context: runner.Context) -> None:
    """Read, learn and write; rank 0 alone has work."""
    index = ShardIndex(options.index)
    num_captions = int(index.caption_counts().sum())
    wanted = TokenizerManifest(
        stage="tokenizer",
        parameters={"vocab_size": options.vocab_size},
        inputs={"index": index.manifest.fingerprint},
        files={},
        versions=library_versions(),
        vocab_size=0,
        end_token=0,
    )
    if runner.already_done(options, context, TokenizerManifest, wanted):
        return
    runner.logger.info("tokenizer: %d captions -> %s", min(num_captions, MAX_CAPTIONS), options.out)
    if options.dry_run or not context.group.is_main:
        return
    index.check_shards()
    tokenizer = train_tokenizer(captions(index, context), options.vocab_size, str(options.out))
    content = tokenizer.to_json().encode()
    files = {
        TOKENIZER_NAME: write_atomic(options.out / TOKENIZER_NAME, lambda file: file.write(content)),
        "tokenizer_config.json": write_json(options.out / "tokenizer_config.json", tokenizer_config(tokenizer)),
    }
    numbers = {"vocab_size": tokenizer.vocab_size, "end_token": tokenizer.end_token}
    write_manifest(options.out, wanted.model_copy(update={"files": files, **numbers}))
    runner.logger.info(
        "tokenizer: %d tokens: data.tokenizer=%s text.vocab_size=%d text.end_token=%d",
        tokenizer.vocab_size,
        options.out,
        tokenizer.vocab_size,
        tokenizer.end_token,
    )


def main(argv: list[str] | None = None) -> int:
    """Entry of `mlcd tokenizer`."""
    return runner.main("tokenizer", Options, run, __doc__, argv)
