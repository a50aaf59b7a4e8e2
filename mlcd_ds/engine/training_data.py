"""What a run is trained on: its index, and the fields that its objective asks for."""

from __future__ import annotations

from collections.abc import Callable

from mlcd_ds.config import Recipe
from mlcd_ds.data.fields import DataField, Labels, Tokens, TrainingData
from mlcd_ds.data.label_store import LabelStore
from mlcd_ds.data.shard_index import ShardIndex
from mlcd_ds.data.tokenizers import load_tokenizer
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.errors import UserError
from mlcd_ds.objectives.registry import kind_of


def open_labels(recipe: Recipe, index: ShardIndex) -> DataField:
    """The labels of data.labels."""
    assert recipe.data.labels
    return Labels(LabelStore(recipe.data.labels, index))


def open_tokens(recipe: Recipe, index: ShardIndex) -> DataField:
    """The captions of data.index, by data.tokenizer."""
    assert recipe.text
    tokenizer, text = load_tokenizer(recipe.data.tokenizer), recipe.text
    source = f"data.tokenizer {recipe.data.tokenizer}"
    if tokenizer.vocab_size > text.vocab_size:
        raise UserError(
            f"{source} has {tokenizer.vocab_size} tokens, text.vocab_size is {text.vocab_size}: they belong to "
            f"different models. Name the other tokenizer, or set text.vocab_size={tokenizer.vocab_size} "
            f"text.end_token={tokenizer.end_token}."
        )
    if tokenizer.end_token != text.end_token:
        raise UserError(
            f"{source} ends texts with token {tokenizer.end_token}, text.end_token is {text.end_token}: set "
            f"text.end_token={tokenizer.end_token}, or name the other tokenizer."
        )
    return Tokens(index, tokenizer, text.context, recipe.data.captions)


FIELDS: dict[str, Callable[[Recipe, ShardIndex], DataField]] = {"labels": open_labels, "tokens": open_tokens}
"""How each field is opened. UserError where what a recipe names does not fit the index."""
STAGES = {"index": "index", "labels": "assign"}
"""Keys below `data:` that hold a stage's folder."""


def missing_keys(recipe: Recipe) -> list[str]:
    """Keys below `data:` that a run of this recipe needs, and that are not given."""
    needed = ("index", *kind_of(recipe.objective).fields_of(recipe))
    return [key for key in needed if key in STAGES and getattr(recipe.data, key) is None]


def open_training_data(recipe: Recipe) -> TrainingData:
    """Open index and fields, and compare them with the recipe. UserError names what is missing or does not fit."""
    for key in missing_keys(recipe):
        raise UserError(f"data.{key} is not given: add data.{key}=FOLDER, made by `mlcd {STAGES[key]}`.")
    assert recipe.data.index
    index, kind = ShardIndex(recipe.data.index), kind_of(recipe.objective)
    data = TrainingData(index, {name: FIELDS[name](recipe, index) for name in kind.fields_of(recipe)})
    _ = data.counts  # an index without captions is refused here
    kind.check_data(recipe, data)
    return data


def open_data(recipe: Recipe, group: Group) -> TrainingData:
    """Open and cross-check index, fields and shards. Collective."""
    data = open_training_data(recipe)
    data.index.check_shards(group.rank, group.size)
    if data.num_samples < recipe.train.global_batch:
        raise UserError(f"train.global_batch {recipe.train.global_batch} is more than the {data.num_samples} samples.")
    return data
