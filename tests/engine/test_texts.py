"""Training on texts, through the command line: what a run keeps, and what is refused before any work."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from distributed_harness import TinyData
from shard_maker import Finished, encode, picture, read_independently, run_child, run_stage, write_tar
from training_runs import DS_CONFIG, tiny_recipe

from mlcd_ds.data.tokenizers import TOKENIZER_NAME, load_tokenizer
from mlcd_ds.engine.weights import newest_checkpoint, read_checkpoint

TEXT = dict(vocab_size=280, context=8, width=32, depth=1, heads=4, mlp_width=64, end_token=1, embed_dim=16)


@pytest.fixture(scope="module")
def tokenizer(tiny_data: TinyData) -> Path:
    """One of 280 tokens, from the captions of the tiny index, by its command."""
    out = tiny_data.index.parent / "tokenizer"
    finished = run_stage("tokenizer", "--index", tiny_data.index, "--vocab-size", 300, "--out", out)
    assert finished.status == 0 and "text.end_token=1" in finished.err, finished.err
    return out


def train(
    folder: Path, data: TinyData, *overrides: object, run: Callable[..., Finished] = run_stage, **text: int
) -> tuple[int, str]:
    """`mlcd train` of a CLIP recipe: status and messages."""
    content = tiny_recipe(data.index, data.labels)
    content |= {"objective": {"name": "clip"}, "head": {}, "text": TEXT | text}
    content["train"] |= {"steps": 3, "out": str(folder / "run")}
    content["optimizer"]["warmup_steps"] = 1
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    finished = run("train", "--deepspeed_config", DS_CONFIG, "--recipe", path, *overrides)
    assert "Traceback" not in finished.err, finished.err
    return finished.status, finished.err


def test_a_run_keeps_its_tokenizer_and_goes_on_with_no_other(
    tiny_data: TinyData, tokenizer: Path, tmp_path: Path
) -> None:
    size = load_tokenizer(str(tokenizer)).vocab_size
    status, told = train(tmp_path, tiny_data, f"data.tokenizer={tokenizer}", run=run_child, vocab_size=size)
    assert status == 0, told
    run = tmp_path / "run"
    fingerprint = load_tokenizer(str(run / TOKENIZER_NAME)).fingerprint
    assert fingerprint == load_tokenizer(str(tokenizer)).fingerprint
    assert read_checkpoint(newest_checkpoint(run)).inputs["tokenizer"] == fingerprint
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name in ("optimizer/logit_scale", "embeddings/norm_image", "embeddings/norm_text", "embeddings/modality_gap"):
        assert all(entry[name] > 0 for entry in entries), name
    assert all(entry["embeddings/modality_gap"] <= 2 for entry in entries)
    other = tmp_path / "other.json"
    content = json.loads((tokenizer / TOKENIZER_NAME).read_text())
    content["normalizer"]["normalizers"].pop()  # capitals stay
    other.write_text(json.dumps(content))
    for start in (run, newest_checkpoint(run)):
        kept = (f"train.init_from={start}", f"train.out={tmp_path / 'next'}")
        status, told = train(tmp_path, tiny_data, f"data.tokenizer={other}", *kept, "--dry-run", vocab_size=size)
        assert status == 2 and f"trained with another tokenizer than data.tokenizer {other}" in told, told
        status, told = train(tmp_path, tiny_data, f"data.tokenizer={run}", *kept, "--dry-run", vocab_size=size)
        assert status == 0 and "# starts from" in told, told
    status, told = train(tmp_path, tiny_data, f"data.tokenizer={other}", vocab_size=size)
    assert status == 2 and "trained on other tokenizer than data.tokenizer names now" in told, told


@pytest.mark.parametrize(
    ("overrides", "text", "message"),
    [
        ((), {}, r"data\.tokenizer clip has 49408 tokens, text\.vocab_size is 280: .* text\.vocab_size=49408"),
        (("data.tokenizer=KEPT",), {"end_token": 0}, r"ends texts with token 1, text\.end_token is 0: set text\.end"),
        (("data.tokenizer=nowhere",), {}, r"tokenizer 'nowhere' is neither 'clip', nor a tokenizer\.json"),
        (("data.captions=words",), {}, r"data\.captions: Input should be 'whole' or 'lines'"),
        (("data.tokenizer=KEPT", "text.embed_dim=8"), {}, r"text\.embed_dim 8 is not model\.embed_dim 16"),
        (("data.tokenizer=KEPT", "data.index=BARE"), {}, r"bare.* indexes no usable caption \(2 missing\)"),
    ],
)
def test_what_does_not_fit_is_one_message(
    tiny_data: TinyData, tokenizer: Path, tmp_path: Path, overrides: tuple[str, ...], text: dict[str, int], message: str
) -> None:
    bare = tmp_path / "bare"
    write_tar(tmp_path / "0.tar", [(f"{number}.jpg", encode(picture(number))) for number in range(2)])
    assert run_stage("index", "--shards", tmp_path / "0.tar", "--out", bare).status == 0
    named = [override.replace("KEPT", str(tokenizer)).replace("BARE", str(bare)) for override in overrides]
    size = {"vocab_size": load_tokenizer(str(tokenizer)).vocab_size} if named and "KEPT" in overrides[0] else {}
    for dry in ((), ("--dry-run",)):
        status, told = train(tmp_path, tiny_data, *named, *dry, **size, **text)
        assert status == 2 and re.search(message, told), told
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_is_trained_on(tiny_data: TinyData, tokenizer: Path, tmp_path: Path) -> None:
    size = load_tokenizer(str(tokenizer)).vocab_size
    status, told = train(tmp_path, tiny_data, f"data.tokenizer={tokenizer}", "--dry-run", vocab_size=size)
    count = len(list(read_independently(tiny_data.shard)))
    assert status == 0 and f"# data: {count} samples of {count} images" in told, told
