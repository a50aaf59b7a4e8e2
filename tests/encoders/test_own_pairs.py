"""Runs over images and texts as pair encoders: which towers, which tokenizer, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pair_runs import SIDE, PairRun, make_pair_run

from mlcd_ds.config import load_recipe
from mlcd_ds.data.tokenizers import TOKENIZER_NAME, clip_tokenizer, train_tokenizer
from mlcd_ds.encoders.registry import load_encoder, load_pair_encoder
from mlcd_ds.engine.weights import read_checkpoint, write_checkpoint_manifest
from mlcd_ds.errors import UserError

TEXTS = ["a photo of a cat", "two dogs " * 20, ""]


@pytest.fixture
def run(tmp_path: Path) -> PairRun:
    return make_pair_run(tmp_path / "run", train={"ema_decay": 0.9})


def test_both_towers_are_the_runs(run: PairRun) -> None:
    encoder = load_pair_encoder(str(run.folder)).to(torch.device("cpu"))
    pixels = torch.randn(2, 3, SIDE, SIDE)
    tokens = torch.from_numpy(run.tokenizer.encode(TEXTS, 24))
    with torch.no_grad():
        assert torch.equal(encoder.image.encode(pixels), run.image(pixels))
        assert torch.equal(encoder.text.encode(TEXTS), run.text(tokens))
        uncut = torch.from_numpy(run.tokenizer.encode(TEXTS, 23))  # the known-bad twin: cut a token earlier
        assert not torch.allclose(run.text(uncut)[1], run.text(tokens)[1], atol=1e-3)
    features = load_encoder(str(run.folder))
    assert features.fingerprint() != encoder.image.fingerprint(), "of which stages tell their files apart"
    average = load_pair_encoder(f"ema:{run.folder}")
    assert "ema" in average.name and average.fingerprint() != encoder.fingerprint()


def message(specification: object) -> str:
    with pytest.raises(UserError) as caught:
        load_pair_encoder(str(specification))
    return str(caught.value)


def test_what_does_not_belong_together_is_one_message(run: PairRun, tmp_path: Path) -> None:
    path = run.folder / TOKENIZER_NAME
    path.write_text(clip_tokenizer().to_json())
    assert f"{path} is another tokenizer than the checkpoints were trained with" in message(run.folder)
    manifest = read_checkpoint(run.checkpoint)
    write_checkpoint_manifest(run.checkpoint, manifest.model_copy(update={"inputs": {}}))
    assert "has 49408 tokens and end token 49407; the text tower takes" in message(run.folder)
    few = train_tokenizer(iter(["a"]), 260, "few")
    content = json.loads(few.to_json())
    content["post_processor"]["special_tokens"]["<|endoftext|>"]["ids"] = [0]
    path.write_text(json.dumps(content))
    assert "and end token 0; the text tower takes" in message(run.folder)
    path.write_text("{")
    assert "cannot be read" in message(run.folder)
    path.unlink()
    assert f"{path} is missing, by which texts become tokens" in message(run.folder)
    other = manifest.model_copy(update={"recipe": load_recipe("demo").model_dump(mode="json")})
    write_checkpoint_manifest(run.checkpoint, other)
    assert "has no text tower: its objective is mlcd" in message(run.folder)
    assert "after ema: comes the folder of a training run" in message(f"ema:{tmp_path}")
    assert "train.ema_decay null" in message(f"ema:{make_pair_run(tmp_path / 'plain').folder}")
    assert all("has no text tower: name a run" in message(other) for other in (tmp_path, "recipe:demo", "pixels"))
