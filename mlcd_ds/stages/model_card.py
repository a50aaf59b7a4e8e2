"""The model card of an export (README.md): what the model is, of which data, how trained, how good, how to load it.

It is for others, so it names no folder of this machine by its path. Every example in it runs in its tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mlcd_ds import __version__
from mlcd_ds.artefacts.manifest import read_manifest
from mlcd_ds.artefacts.readers import read_json_object
from mlcd_ds.config import Recipe
from mlcd_ds.data.shard_index import IndexManifest
from mlcd_ds.engine.weights import CheckpointManifest, Weights
from mlcd_ds.errors import UserError
from mlcd_ds.models.text import TextTower
from mlcd_ds.models.tower import num_parameters
from mlcd_ds.models.vit import ViT
from mlcd_ds.stages.card_examples import open_clip_example, timm_example, transformers_example

CARD_NAME = "README.md"
REPORT_FIX = "--report takes the report.json of `mlcd evaluate`."
MAX_FIGURES = 200
PAPERS = {"clip": "arXiv 2103.00020", "siglip": "arXiv 2303.15343"}  # others: of MLCD and its kin
MLCD_PAPER = "arXiv 2407.17331"


@dataclass(frozen=True)
class Card:
    """What a card is made of."""

    name: str
    checkpoint: CheckpointManifest
    recipe: Recipe
    image: ViT
    text: TextTower | None
    bias: float | None
    weights: Weights
    license: str | None
    report: Path | None
    open_clip_problem: str | None


def model_card(card: Card) -> str:
    """The whole file. UserError where the report cannot be read."""
    sections = {
        "Data": _data(card),
        "Training": _training(card),
        "Figures": _figures(card),
        "Use": _use(card),
        "Licence": _licence(card),
    }
    front = yaml.safe_dump(_front_matter(card), sort_keys=False, allow_unicode=True)
    parts = [f"---\n{front}---", f"# {card.name}", _summary(card)]
    parts += [f"## {title}\n{text}" for title, text in sections.items()]
    return "\n\n".join(parts) + "\n"


def _front_matter(card: Card) -> dict[str, Any]:
    task = "zero-shot-image-classification" if card.text else "image-feature-extraction"
    libraries = ["transformers", *([] if card.open_clip_problem else ["open_clip", "timm"])]
    return {
        "license": card.license or "other",
        "library_name": "transformers",
        "pipeline_tag": task,
        "tags": ["vision", card.recipe.objective.name, *libraries, "mlcd_ds"],
    }


def _summary(card: Card) -> str:
    image, lines = card.image.config, []
    positions = "learned" if image.positions == "learned" else "rotary"
    lines.append(
        f"An image tower, a vision transformer for {image.image_size} x {image.image_size} pixels: patches of "
        f"{image.patch_size}, width {image.width}, {image.depth} blocks, {positions} positions, "
        f"{num_parameters(card.image):,} parameters; embeddings of {image.embed_dim} channels."
    )
    if card.text:
        text = card.text.config
        lines.append(
            f"A text tower, a causal transformer for {text.context} tokens of {text.vocab_size}: width {text.width}, "
            f"{text.depth} blocks, {num_parameters(card.text):,} parameters."
        )
    lines.append(f"Trained by mlcd_ds {__version__}.")
    told = " ".join(card.recipe.description.split())
    return "\n".join(lines) + f"\n\n> {told}"


def _table(rows: Mapping[str, object]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


def _data(card: Card) -> str:
    folder = card.recipe.data.index
    try:
        index = read_manifest(folder, IndexManifest, "index") if folder else None
    except UserError:
        index = None
    if index is None or card.checkpoint.inputs.get("index", index.fingerprint) != index.fingerprint:
        return "The index of its images was not at hand when this was written."
    dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(index.dropped.items()) if count)
    return _table(
        {
            "images": f"{index.num_images:,} in {len(index.shards):,} shards (WebDataset)",
            "captions": f"{index.num_captions:,}",
            "left out before": dropped or "none",
            "index (SHA-256)": f"`{index.fingerprint}`",
        }
    )


def _training(card: Card) -> str:
    recipe, checkpoint = card.recipe, card.checkpoint
    train, optimizer = recipe.train, recipe.optimizer
    samples = checkpoint.step * train.global_batch
    rows: dict[str, object] = {
        "objective": f"`{recipe.objective.name}` ({PAPERS.get(recipe.objective.name, MLCD_PAPER)})",
        "steps": f"{checkpoint.step:,} of {train.steps:,}, {samples:,} samples",
        "global batch": f"{train.global_batch:,}",
        "optimizer": f"{optimizer.name}, betas {optimizer.betas[0]:g} and {optimizer.betas[1]:g}, weight decay "
        f"{optimizer.weight_decay:g}",
        "learning rate": f"{optimizer.lr:g}, {optimizer.warmup_steps:,} steps of warm-up, then {optimizer.schedule}",
        "precision": train.precision,
        "drop path, dropped patches": f"{train.drop_path:g}, {train.token_drop:g}",
    }
    if train.init_from:
        rows["started from"] = f"`{_source(train.init_from)}`"
    for name, frozen in sorted(checkpoint.frozen.items()):
        rows[f"{name} tower"] = f"frozen, from `{_source(Path(frozen.source))}`"
    average = f"a moving average, decay {train.ema_decay}"
    rows["weights"] = average if card.weights == "ema" else "those of the last step"
    rows["seed"] = train.seed
    rows["made with"] = ", ".join(f"{name} {version}" for name, version in sorted(checkpoint.versions.items()))
    if checkpoint.git_commit:
        rows["commit"] = f"`{checkpoint.git_commit}`"
    return _table(rows)


def _source(folder: Path) -> str:
    """A run or a folder by its name alone."""
    if folder.name.startswith("step_") and folder.parent.name == "checkpoints":
        return f"{folder.parent.parent.name}, {folder.name}"
    return folder.name


def _figures(card: Card) -> str:
    if card.report is None:
        return "Not evaluated."
    report = read_json_object(card.report, REPORT_FIX)
    found = list(_numbers(report, ""))
    if not found:
        raise UserError(f"{card.report} holds no figure. {REPORT_FIX}")
    shown = _table({key.replace("|", "/"): value for key, value in found[:MAX_FIGURES]})
    model = f" on {report['model']}" if isinstance(report.get("model"), str) else ""
    return f"{shown}\n\nFrom the report of `mlcd evaluate`{model}; accuracies are shares of 1."


def _numbers(content: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """Dotted keys and numbers of a report, without its lists."""
    for key, value in content.items():
        name = " ".join(f"{prefix}{key}".split())
        if isinstance(value, dict):
            yield from _numbers(value, f"{name}.")
        elif isinstance(value, float):
            yield name, f"{value:.4f}"
        elif isinstance(value, int) and not isinstance(value, bool):
            yield name, f"{value:,}"


def _use(card: Card) -> str:
    is_pair = card.text is not None
    parts = [
        "`folder` is where this file lies.",
        f"### transformers\n{_code(transformers_example(is_pair, card.bias is not None))}",
    ]
    if card.text:
        context = card.text.config.context
        parts.append(
            f"Texts of more than {context} tokens must be cut: `truncation=True`, or of the pipeline "
            '`tokenizer_kwargs={"truncation": True}`.'
        )
    if card.bias is not None:
        parts.append(
            f"It was trained by SigLIP's loss, which judges each pair by sigmoid(logit + bias), bias {card.bias:.4f}. "
            "A `CLIPModel` has no place for the bias: its logits are without it, and it stands in config.json as "
            "`logit_bias`. Which text fits best does not depend on it."
        )
    if card.open_clip_problem:
        parts.append(f"There is no folder for open_clip: {card.open_clip_problem}.")
    else:
        parts.append(f"### open_clip\n{_code(open_clip_example(is_pair))}")
        parts.append(f"### timm\nThe image tower with its projection.\n{_code(timm_example(card.image.config))}")
    return "\n\n".join(parts)


def _code(text: str) -> str:
    return f"```python\n{text}```"


def _licence(card: Card) -> str:
    if card.license:
        return f"The weights: `{card.license}`."
    return (
        "Not chosen yet: write the front matter with `mlcd export --license ID`. Until then, all rights are reserved."
    )
