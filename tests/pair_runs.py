"""Folders of runs over images and texts, as `mlcd train` leaves them, with random weights: no training needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mlcd_ds.artefacts.files import record_of
from mlcd_ds.config import Recipe, dump_recipe, parse_recipe
from mlcd_ds.data.tokenizers import TOKENIZER_NAME, Tokenizer, clip_tokenizer, train_tokenizer
from mlcd_ds.engine.weights import (
    AVERAGE_FILES,
    WEIGHT_FILES,
    CheckpointManifest,
    FrozenTower,
    write_checkpoint_manifest,
)
from mlcd_ds.models.text import TextTower
from mlcd_ds.models.vit import ViT
from mlcd_ds.objectives.registry import kind_of

WORDS = ["a photo of a cat", "a photo of a dog", "two dogs and a cat", "the house of a cat", "this is a photo of"] * 5
SIDE = 32


def own_tokenizer() -> Tokenizer:
    """A small byte-pair encoding, whose end token is not the one of largest number."""
    return train_tokenizer(iter(WORDS), 300, "own")


TOKENIZERS = {"own": own_tokenizer, "clip": clip_tokenizer}


@dataclass(frozen=True)
class PairRun:
    """A run's folder and what is in it."""

    folder: Path
    recipe: Recipe
    image: ViT
    text: TextTower
    tokenizer: Tokenizer

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / "step_00000007"


def pair_recipe(folder: Path, objective: str, tokenizer: Tokenizer, /, **sections: dict[str, Any]) -> Recipe:
    """Of tiny towers; `sections` change keys."""
    content: dict[str, Any] = {
        "description": "tiny towers",
        "model": dict(image_size=SIDE, patch_size=8, width=36, depth=2, heads=3, mlp_width=85, embed_dim=20),
        "text": dict(vocab_size=tokenizer.vocab_size, end_token=tokenizer.end_token, context=24, width=32, depth=2)
        | dict(heads=4, mlp_width=75, embed_dim=20),
        "data": {"num_streams": 4},
        "objective": {"name": objective},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2},
        "train": {"steps": 8, "global_batch": 16, "precision": "fp32", "out": str(folder)},
    }
    for name, changes in sections.items():
        content[name] = content.get(name, {}) | changes
    return parse_recipe(content, "test")


def make_pair_run(
    folder: Path,
    objective: str = "clip",
    tokenizer: str = "own",
    frozen: FrozenTower | None = None,
    **sections: dict[str, Any],
) -> PairRun:
    """A run with one checkpoint, and with train.ema_decay an average, which is other weights. `frozen`: its image tower
    comes from there."""
    tokens = TOKENIZERS[tokenizer]()
    recipe = pair_recipe(folder, objective, tokens, **sections)
    assert recipe.text
    image, text = ViT(recipe.model), TextTower(recipe.text)
    run = PairRun(folder, recipe, image.eval(), text.eval(), tokens)
    run.checkpoint.mkdir(parents=True)
    for seed, names in ((1, AVERAGE_FILES), (0, WEIGHT_FILES)):
        if names is AVERAGE_FILES and not recipe.train.ema_decay:
            continue
        generator = torch.Generator().manual_seed(seed)
        module = kind_of(recipe.objective).engine_module(recipe)
        assert module is not None
        for tower in (image, text):
            tower.init_weights(generator)
        with torch.no_grad():
            for parameter in (*image.parameters(), *text.parameters(), *module.parameters()):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        parts = {"text": text, "objective": module} | ({} if frozen else {"image": image})
        for name, part in parts.items():
            save_file(part.state_dict(), run.checkpoint / names[name])
    files = {path.name: record_of(path) for path in run.checkpoint.iterdir()}
    manifest = CheckpointManifest(
        step=7,
        num_ranks=1,
        zero_stage=1,
        inputs={"tokenizer": tokens.fingerprint},
        recipe=recipe.model_dump(mode="json"),
        files=files,
        frozen={"image": frozen} if frozen else {},
        versions={"torch": torch.__version__},
        git_commit=None,
    )
    write_checkpoint_manifest(run.checkpoint, manifest)
    (folder / "config.yaml").write_text(dump_recipe(recipe))
    (folder / TOKENIZER_NAME).write_text(tokens.to_json())
    return run
