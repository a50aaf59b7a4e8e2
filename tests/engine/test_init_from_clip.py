"""Starting from the folder of a whole CLIP model: both towers and the scale, frozen ones too; there and back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pair_runs import SIDE, PairRun, make_pair_run, own_tokenizer, pair_recipe

from mlcd_ds.config import Recipe
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.engine.build_towers import BuiltTowers, build_towers
from mlcd_ds.engine.init_from import Start
from mlcd_ds.engine.weights import load_backbone, load_scale, load_text_tower
from mlcd_ds.errors import UserError
from mlcd_ds.stages.export import Options
from mlcd_ds.stages.export import run as run_export
from mlcd_ds.stages.runner import Context

VISION = dict(image_size=SIDE, patch_size=8, hidden_size=36, num_hidden_layers=2, num_attention_heads=3)
TEXT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=75)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Group(dist.group.WORLD)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A CLIP model as transformers saves it, with the shape of `pair_recipe`."""
    from transformers import CLIPConfig, CLIPModel

    tokens, folder = own_tokenizer(), tmp_path_factory.mktemp("released")
    text = TEXT | dict(vocab_size=tokens.vocab_size, eos_token_id=tokens.end_token, max_position_embeddings=24)
    torch.manual_seed(0)
    config = CLIPConfig(vision_config=VISION | {"intermediate_size": 85}, text_config=text, projection_dim=20)
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder, model


def recipe_from(folder: Path, objective: str = "clip", /, **sections: dict[str, Any]) -> Recipe:
    sections["train"] = {"init_from": str(folder), **sections.get("train", {})}
    return pair_recipe(folder.parent / "run", objective, own_tokenizer(), **sections)


def build(recipe: Recipe, group: Group) -> BuiltTowers:
    assert recipe.train.init_from
    return build_towers(recipe, Start.at(recipe.train.init_from, group), group)


def export(run: PairRun, out: Path, group: Group) -> None:
    run_export(Options(run=run.folder, out=out), Context(group, torch.device("cpu")))


def test_both_towers_and_the_scale_are_the_models(released: tuple[Path, Any], group: Group) -> None:
    folder, model = released
    built = build(recipe_from(folder), group)
    assert built.notes == ["the backbone", "the text tower", "the scale"]
    assert built.trained.objective.log_scale.item() == model.logit_scale.item()
    pixels, tokens = torch.randn(3, 3, SIDE, SIDE), torch.tensor([[0, 9, 30, 1], [0, 200, 1, 1]])
    with torch.no_grad():
        ours = built.trained["image"](pixels), built.trained["text"](tokens)
        told = model(pixel_values=pixels, input_ids=tokens)
        right = model.get_image_features(pixels).pooler_output, model.get_text_features(tokens).pooler_output
        for output, expected in zip(ours, right, strict=True):
            assert (output - expected).abs().max() < TOLERANCE  # measured 8.3e-7
        fresh = build_towers(recipe_from(folder), None, group).trained  # the known-bad twin: nothing filled
        assert (fresh["text"](tokens) - right[1]).abs().max() > 1e3 * TOLERANCE
    assert told.logits_per_image.isfinite().all()


def test_a_sum_takes_the_factor_of_its_part(released: tuple[Path, Any], group: Group) -> None:
    nclip = {"name": "nclip", "num_dims": 8, "head_width": 4}
    parts = {"name": "sum", "parts": [{"objective": nclip}, {"objective": {"name": "clip"}}]}
    built = build(recipe_from(released[0], "clip", objective=parts), group)
    assert built.notes == ["the backbone", "the text tower", "the scale"]
    assert built.trained.objective.clip.log_scale.item() == released[1].logit_scale.item()
    alone = build(recipe_from(released[0], "clip", objective=nclip), group)
    assert alone.notes == ["the backbone", "the text tower"], "it has none"


def test_a_factor_of_the_other_loss_is_not_taken(released: tuple[Path, Any], group: Group) -> None:
    built = build(recipe_from(released[0], "siglip"), group)
    assert built.notes == ["the backbone", "the text tower"]
    assert built.trained.objective.log_scale.exp().item() == pytest.approx(10.0)
    assert built.trained.objective.bias.item() == -10.0


@pytest.mark.parametrize("library", ["transformers", "open_clip"])
@pytest.mark.parametrize("objective", ["clip", "siglip"])
def test_out_and_in_again_is_exact(objective: str, library: str, tmp_path: Path, group: Group) -> None:
    """A run, exported, starts a run of the same weights, bit for bit."""
    run = make_pair_run(tmp_path / "run", objective)
    export(run, tmp_path / "export", group)
    folder = tmp_path / "export" if library == "transformers" else tmp_path / "export" / "open_clip"
    built = build(recipe_from(folder, objective), group)
    assert built.notes == ["the backbone", "the text tower", "the scale"]
    for name, tower in (("image", run.image), ("text", run.text)):
        filled = built.trained[name].state_dict()
        assert all(torch.equal(filled[key], value) for key, value in tower.state_dict().items())
    log_scale, bias = load_scale(run.checkpoint)
    assert torch.equal(built.trained.objective.log_factor, log_scale)
    assert bias is None or torch.equal(built.trained.objective.bias[0], bias)


def test_shorter_texts_and_other_shapes(released: tuple[Path, Any], group: Group) -> None:
    folder, model = released
    built = build(recipe_from(folder, text={"context": 8}), group)
    assert "texts of 8 tokens instead of 24" in built.notes
    positions = built.trained["text"].embeddings.position_embedding.weight
    assert torch.equal(positions, model.text_model.embeddings.position_embedding.weight[:8])
    for changes, told in (
        ({"context": 32}, "context 24, text.context is 32"),
        ({"width": 64}, "width 32, text.width is 64"),
        ({"end_token": 0}, "end_token 1, text.end_token is 0"),
    ):
        with pytest.raises(UserError, match=f"its text tower has {told}.*--towers image"):
            build(recipe_from(folder, text=changes), group)


def lit_run(folder: Path, released: Path, group: Group, **sections: dict[str, Any]) -> tuple[BuiltTowers, PairRun]:
    """A LiT run's towers as they start, and the run's folder with another text tower."""
    sections["towers"] = {"image": "frozen"}
    built = build(recipe_from(released, **sections), group)
    sections["train"] = {"init_from": str(released)}
    return built, make_pair_run(folder, frozen=built.records["image"], **sections)


def test_a_frozen_tower_of_a_whole_model(released: tuple[Path, Any], group: Group, tmp_path: Path) -> None:
    from transformers import CLIPModel

    built, run = lit_run(tmp_path / "lit", released[0], group)
    assert built.records["image"].source == str(released[0].resolve())
    export(run, tmp_path / "export", group)
    told, pixels = CLIPModel.from_pretrained(tmp_path / "export").eval(), torch.randn(3, 3, SIDE, SIDE)
    with torch.no_grad():
        right = released[1].get_image_features(pixels).pooler_output
        assert (told.get_image_features(pixels).pooler_output - right).abs().max() < TOLERANCE
        tokens = torch.tensor([[0, 9, 30, 1]])
        ours = load_text_tower(run.checkpoint)(tokens)
        assert (told.get_text_features(tokens).pooler_output - ours).abs().max() < TOLERANCE
    assert f"frozen, from `{released[0].name}`" in (tmp_path / "export/README.md").read_text()


def test_a_frozen_tower_without_a_projection_gives_its_features(
    released: tuple[Path, Any], group: Group, tmp_path: Path
) -> None:
    from transformers import CLIPVisionModel

    vision = CLIPVisionModel.from_pretrained(released[0]).eval()
    vision.save_pretrained(tmp_path / "vision")
    wide = {"embed_dim": 36}
    built, run = lit_run(tmp_path / "lit", tmp_path / "vision", group, model=wide, text=wide)
    assert "the projection starts as the identity" in built.notes
    pixels = torch.randn(3, 3, SIDE, SIDE)
    with torch.no_grad():
        for tower in (built.frozen["image"], load_backbone(run.checkpoint)):
            assert (tower(pixels) - vision(pixel_values=pixels).pooler_output).abs().max() < TOLERANCE
    frozen = {"image": "frozen"}
    with pytest.raises(UserError, match=r"the projection starts at random, and towers.image is frozen"):
        build(recipe_from(tmp_path / "vision", towers=frozen), group)
    with pytest.raises(UserError, match=r"holds no text tower, and towers.text is frozen"):
        build(recipe_from(tmp_path / "vision", towers={"text": "frozen"}), group)


def test_a_frozen_text_tower(released: tuple[Path, Any], group: Group) -> None:
    built = build(recipe_from(released[0], towers={"text": "frozen"}), group)
    assert built.trained.names == ("image",) and built.records["text"].source == str(released[0].resolve())
