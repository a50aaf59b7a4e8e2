"""Images and texts through the real command lines: a tokenizer learned, CLIP trained, then LiT on its image tower, and
what a stranger gets of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from command_line import CPU_CONFIG, mlcd
from distributed_harness import TinyData
from shard_maker import run_stage

from mlcd_ds.encoders.registry import load_pair_encoder
from mlcd_ds.engine.weights import newest_checkpoint, read_checkpoint

TEXTS = ["picture 7", "A picture!", "picture 12 " * 9]
MODEL = {"image_size": 32, "patch_size": 16, "width": 32, "depth": 2, "heads": 2, "mlp_width": 64, "embed_dim": 16}
TEXT = {"context": 12, "width": 32, "depth": 1, "heads": 4, "mlp_width": 64, "embed_dim": 16}


def here(stage: str, *flags: object) -> None:
    """In this process, which has loaded everything."""
    done = run_stage(stage, *flags)
    assert done.status == 0, done.err


@pytest.mark.pipeline
def test_trained_exported_and_loaded_by_a_stranger(tiny_data: TinyData, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    here("tokenizer", "--index", tiny_data.index, "--vocab-size", 300, "--out", tmp_path / "tokenizer")
    numbers = json.loads((tmp_path / "tokenizer/manifest.json").read_text())
    recipe = {
        "description": "for tests",
        "model": MODEL,
        "text": TEXT | {key: numbers[key] for key in ("vocab_size", "end_token")},
        "data": {"index": str(tiny_data.index), "tokenizer": str(tmp_path / "tokenizer"), "num_streams": 4},
        "objective": {"name": "clip"},
        "optimizer": {"lr": 1e-3, "warmup_steps": 1},
        "train": {"steps": 3, "global_batch": 16, "precision": "fp32"},
    }
    (tmp_path / "pairs.yaml").write_text(yaml.safe_dump(recipe))
    train = ("train", "--deepspeed_config", CPU_CONFIG, "--recipe", tmp_path / "pairs.yaml")
    mlcd(*train, f"train.out={tmp_path / 'clip'}")
    here("export", "--run", tmp_path / "clip", "--out", tmp_path / "clip-export")
    lit = (f"train.out={tmp_path / 'lit'}", f"train.init_from={tmp_path / 'clip-export'}", "towers.image=frozen")
    assert "starts from" in mlcd(*train, *lit)
    here("export", "--run", tmp_path / "lit", "--out", tmp_path / "lit-export", "--license", "apache-2.0")
    assert set(read_checkpoint(newest_checkpoint(tmp_path / "lit")).frozen) == {"image"}
    pixels, found = torch.randn(2, 3, 32, 32), {}
    for name in ("clip", "lit"):
        model, info = CLIPModel.from_pretrained(tmp_path / f"{name}-export", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / f"{name}-export")
        tokens = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
        ours = load_pair_encoder(str(tmp_path / name))
        with torch.inference_mode():
            told = model.eval()(pixel_values=pixels, **tokens)
            both = (ours.image.encode(pixels), told.image_embeds), (ours.text.encode(TEXTS), told.text_embeds)
        for right, theirs in both:
            torch.testing.assert_close(theirs, torch.nn.functional.normalize(right, dim=1), rtol=0, atol=1e-5)
        found[name] = told
    assert torch.equal(found["clip"].image_embeds, found["lit"].image_embeds), "the image tower is frozen"
    assert (found["clip"].text_embeds - found["lit"].text_embeds).abs().max() > 1e-3
    card = (tmp_path / "lit-export/README.md").read_text()
    assert "| images | 100 in 1 shards" in card and "frozen, from `clip-export`" in card and str(tmp_path) not in card
