"""Whole models of images and texts, exported: what transformers, open_clip and timm make of the folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pair_runs import SIDE, PairRun, make_pair_run
from PIL import Image
from safetensors.torch import load_file, save_file
from shard_maker import picture, run_stage
from torch import Tensor

from mlcd_ds.encoders.base import PairEncoder
from mlcd_ds.encoders.registry import load_pair_encoder
from mlcd_ds.engine.weights import load_scale
from mlcd_ds.objectives.pair_objective import Scale
from mlcd_ds.stages.card_examples import FOLDER_LINE

TOLERANCE = 1e-5  # of embeddings at unit length; measured 2.4e-7
TEXTS = ["a photo of a cat", "Two dogs, and 1 cat!", "naïve 漢字", "", "a photo of a house " * 9]
CASES = [("clip", "own"), ("siglip", "own"), ("clip", "clip")]


def export(run: PairRun, out: Path, *flags: object, status: int = 0) -> str:
    done = run_stage("export", "--run", run.folder, "--out", out, *flags)
    assert done.status == status and "Traceback" not in done.err, done.err
    return done.err


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PairRun, Path]:
    """A run and its export."""
    folder = tmp_path_factory.mktemp("pairs")
    run = make_pair_run(folder / "run", *request.param)
    export(run, folder / "export")
    return run, folder / "export"


def images(count: int = 5) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))


def embeddings(encoder: PairEncoder, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Of both towers, at unit length."""
    with torch.inference_mode():
        both = encoder.image.encode(pixels), encoder.text.encode(TEXTS)
    return tuple(torch.nn.functional.normalize(output, dim=1) for output in both)  # type: ignore[return-value]


def theirs(folder: Path, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings and logits by transformers' own classes alone."""
    from transformers import AutoTokenizer, CLIPModel

    model, info = CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        told = model.eval()(pixel_values=pixels, **tokens)
    return told.image_embeds, told.text_embeds, told.logits_per_image


def test_transformers_computes_the_same(exported: tuple[PairRun, Path]) -> None:
    run, folder = exported
    image_BE, text_BE = embeddings(load_pair_encoder(str(run.folder)), images())
    their_image_BE, their_text_BE, logits_BB = theirs(folder, images())
    torch.testing.assert_close(their_image_BE, image_BE, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(their_text_BE, text_BE, rtol=0, atol=TOLERANCE)
    scale = load_scale(run.checkpoint)[0].exp()
    torch.testing.assert_close(logits_BB / scale, image_BE @ text_BE.T, rtol=0, atol=TOLERANCE)
    again = embeddings(load_pair_encoder(str(folder)), images())  # as we read a Hugging Face folder
    for ours, read in zip((image_BE, text_BE), again, strict=True):
        torch.testing.assert_close(read, ours, rtol=0, atol=TOLERANCE)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def of_another_end(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", text_config=config["text_config"] | {"eos_token_id": 2})


def of_clips_splitting(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", tokenizer_class="CLIPTokenizer")


def of_swapped_projections(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["text_projection.weight"] = weights["text_projection.weight"].roll(1, 0)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("spoil", [of_another_end, of_clips_splitting, of_swapped_projections])
def test_a_wrong_folder_is_told_apart(spoil: Any, tmp_path: Path) -> None:
    """The known-bad twins: another end of texts, CLIP's words with another vocabulary, another projection."""
    run = make_pair_run(tmp_path / "run")
    export(run, tmp_path / "export")
    spoil(tmp_path / "export")
    text_BE = embeddings(load_pair_encoder(str(run.folder)), images())[1]
    assert (theirs(tmp_path / "export", images())[1] - text_BE).abs().max() > 1e3 * TOLERANCE


def test_a_strangers_pipeline_ranks_as_our_encoder_does(exported: tuple[PairRun, Path]) -> None:
    from transformers import pipeline

    run, folder = exported
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    labels, pictures = ["cat", "dog", "house", "photo"], [picture(seed, SIDE, SIDE) for seed in range(4)]
    encoder = load_pair_encoder(str(run.folder))
    pixels = encoder.image.pixels
    mean, std = (torch.tensor(value)[:, None, None] for value in (pixels.mean, pixels.std))
    given = torch.stack([(torch.from_numpy(array).permute(2, 0, 1) - mean) / std for array in pictures])
    with torch.inference_mode():
        image_BE = torch.nn.functional.normalize(encoder.image.encode(given), dim=1)
        text_BE = torch.nn.functional.normalize(encoder.text.encode([f"a {label}" for label in labels]), dim=1)
    ours = (image_BE @ text_BE.T * load_scale(run.checkpoint)[0].exp()).softmax(1)
    for array, right in zip(pictures, ours, strict=True):
        told = classify(Image.fromarray(array), candidate_labels=labels, hypothesis_template="a {}")
        scores = {entry["label"]: entry["score"] for entry in told}
        assert [entry["label"] for entry in told] == [labels[at] for at in right.argsort(descending=True)]
        assert np.allclose([scores[label] for label in labels], right, atol=1e-4)


def test_the_average_is_exported_too(tmp_path: Path) -> None:
    run = make_pair_run(tmp_path / "run", train={"ema_decay": 0.9})
    export(run, tmp_path / "average", "--weights", "ema")
    text_BE = embeddings(load_pair_encoder(f"ema:{run.folder}"), images())[1]
    torch.testing.assert_close(theirs(tmp_path / "average", images())[1], text_BE, rtol=0, atol=TOLERANCE)
    last_BE = embeddings(load_pair_encoder(str(run.folder)), images())[1]
    assert (last_BE - text_BE).abs().max() > 1e-3


# --- the model card


def examples(folder: Path) -> dict[str, str]:
    """Of a card, by the library that they are for."""
    found = re.findall(r"### (\w+)\n.*?```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return dict(found)


def play(example: str, folder: Path) -> dict[str, Any]:
    """Run an example where picture.jpg lies; returns its names."""
    assert FOLDER_LINE in example
    names: dict[str, Any] = {}
    exec(example.replace(FOLDER_LINE, f"folder = {str(folder)!r}\n"), names)
    return names


@pytest.fixture
def pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: tuple[PairRun, Path]) -> Tensor:
    """The pixels of a square picture.jpg in the working folder."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture(3, SIDE, SIDE)).save("picture.jpg")
    mean, std = (torch.tensor(value)[:, None, None] for value in _normalisation(exported[0]))
    array = np.asarray(Image.open("picture.jpg"))
    return ((torch.from_numpy(array.copy()).permute(2, 0, 1) - mean) / std)[None]


def _normalisation(run: PairRun) -> tuple[Any, Any]:
    pixels = load_pair_encoder(str(run.folder)).image.pixels
    return pixels.mean, pixels.std


def test_the_cards_examples_run_in_transformers(exported: tuple[PairRun, Path], pixels: Tensor) -> None:
    run, folder = exported
    names = play(examples(folder)["transformers"], folder)
    image_BE, _ = embeddings(load_pair_encoder(str(run.folder)), pixels)
    torch.testing.assert_close(names["images"], image_BE, rtol=0, atol=1e-4)
    assert {entry["label"] for entry in names["answer"]} == {"cat", "dog"}
    bias = load_scale(run.checkpoint)[1]
    assert (bias is None) == ("probabilities" not in names)
    if bias is not None:
        torch.testing.assert_close(names["probabilities"], (names["logits"] + bias).sigmoid())


def test_the_cards_examples_run_in_open_clip(exported: tuple[PairRun, Path], pixels: Tensor) -> None:
    pytest.importorskip("open_clip")
    run, folder = exported
    names = play(examples(folder)["open_clip"], folder)
    encoder = load_pair_encoder(str(run.folder))
    image_BE, text_BE = embeddings(encoder, pixels)
    torch.testing.assert_close(names["images"], image_BE, rtol=0, atol=1e-4)
    with torch.inference_mode():
        told = names["model"].encode_text(names["tokenizer"](TEXTS[:4]), normalize=True)
    torch.testing.assert_close(told, text_BE[:4], rtol=0, atol=TOLERANCE)
    scale, bias = load_scale(run.checkpoint)
    torch.testing.assert_close(names["model"].logit_scale.detach(), scale)
    assert (names["model"].logit_bias is None) == (bias is None)
    if bias is not None:
        torch.testing.assert_close(names["model"].logit_bias.detach(), bias)


def test_the_cards_examples_run_in_timm(exported: tuple[PairRun, Path], pixels: Tensor) -> None:
    pytest.importorskip("timm")
    run, folder = exported
    model = play(examples(folder)["timm"], folder)["model"]
    with torch.inference_mode():
        told, ours = model(images()), load_pair_encoder(str(run.folder)).image.encode(images())
    torch.testing.assert_close(told, ours, rtol=1e-4, atol=1e-4)


def test_a_card_tells_data_training_and_figures(tmp_path: Path) -> None:
    run = make_pair_run(tmp_path / "run", "siglip")
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"model": "x", "acc1": 0.25, "retrieval": {"image|r@1": 0.5}, "n": 1488, "l": [1]}))
    export(run, tmp_path / "told", "--report", report, "--license", "apache-2.0")
    text = (tmp_path / "told" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "apache-2.0" and front["pipeline_tag"] == "zero-shot-image-classification"
    assert "| acc1 | 0.2500 |" in text and "| retrieval.image/r@1 | 0.5000 |" in text and "| n | 1,488 |" in text
    for told in ("7 of 8, 112 samples", "siglip", "arXiv 2303.15343", "`logit_bias`", "was not at hand"):
        assert told in text, told
    assert str(tmp_path) not in text, "a card names no folder of this machine"
    flags = ("--license", "apache-2.0", "--report", run.folder / "tokenizer.json")
    assert "made from other report" in export(run, tmp_path / "told", *flags, status=2)
    assert "license='apache-2.0', now license=None" in export(run, tmp_path / "told", status=2)
    export(run, tmp_path / "silent")
    silent = (tmp_path / "silent" / "README.md").read_text()
    assert yaml.safe_load(silent.split("---")[1])["license"] == "other"
    assert "Not evaluated." in silent and "Not chosen yet" in silent


# --- what does not fit


def test_another_export_in_the_same_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    run, out = make_pair_run(tmp_path / "run"), tmp_path / "export"
    export(run, out)
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {"tokenizer.json", "open_clip/tokenizer.json", "README.md"} < names and "projection.safetensors" not in names
    assert "now towers='image'" in export(run, out, "--towers", "image", status=2)
    (out / "README.md").write_text("edited")
    load_pair_encoder(str(out))
    assert "done already" in export(run, out)
    export(run, out, "--towers", "image", "--overwrite")
    left = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert left - names == {"projection.safetensors"}
    gone = {f"{folder}{name}" for folder in ("", "open_clip/") for name in ("tokenizer.json", "tokenizer_config.json")}
    assert names - left == gone
    assert "done already" in export(run, out, "--towers", "image")
    export(run, tmp_path / "dry", "--dry-run")
    assert not (tmp_path / "dry").exists()


def test_a_factor_beyond_its_bounds_is_the_bound() -> None:
    scale = Scale(1000.0, (1.0, 100.0))
    assert scale.log_factor.exp().item() == pytest.approx(100.0) == scale({})["scale"].item()


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    run = make_pair_run(tmp_path / "rotary", model={"positions": "rope2d"})
    assert "learned positions and no registers" in export(run, tmp_path / "none", status=2)
    ended_by_two = make_pair_run(tmp_path / "two", text={"end_token": 2})
    assert "the end token has number 2, which a CLIPModel takes" in export(ended_by_two, tmp_path / "none", status=2)
    export(run, tmp_path / "image", "--towers", "image")
    assert json.loads((tmp_path / "image/config.json").read_text())["model_type"] == "mlcd"
    assert not (tmp_path / "image/open_clip").exists() and "no folder for open_clip" in (
        (tmp_path / "image/README.md").read_text()
    )
    run = make_pair_run(tmp_path / "two activations", text={"activation": "gelu"})
    assert "no folder for open_clip: open_clip has one activation" in export(run, tmp_path / "mixed")
    ours = embeddings(load_pair_encoder(str(run.folder)), images())
    for right, told in zip(ours, theirs(tmp_path / "mixed", images()), strict=False):
        torch.testing.assert_close(told, right, rtol=0, atol=TOLERANCE)
    assert not (tmp_path / "mixed/open_clip").exists()
    assert "holds no figure" in export(run, tmp_path / "none", "--report", _json(tmp_path, {}), status=2)
    assert "is missing. --report takes" in export(run, tmp_path / "none", "--report", tmp_path / "no.json", status=2)
    assert "--license" in export(run, tmp_path / "none", "--license", "Mine: all!", status=2)
    assert not (tmp_path / "none").exists()


def _json(folder: Path, content: object) -> Path:
    (folder / "content.json").write_text(json.dumps(content))
    return folder / "content.json"


def test_an_image_tower_alone_is_as_before(tmp_path: Path) -> None:
    from transformers import CLIPVisionModel

    run = make_pair_run(tmp_path / "run")
    export(run, tmp_path / "image", "--towers", "image")
    model, info = CLIPVisionModel.from_pretrained(tmp_path / "image", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    projection = load_file(tmp_path / "image/projection.safetensors")["projection.weight"]
    with torch.inference_mode():
        told = model.eval()(pixel_values=images()).pooler_output @ projection.T
        torch.testing.assert_close(told, run.image(images()), rtol=1e-4, atol=1e-5)
    note = json.loads((tmp_path / "image/open_clip/open_clip_config.json").read_text())["note"]
    assert "placeholder" in note
    front = yaml.safe_load((tmp_path / "image/README.md").read_text().split("---")[1])
    assert front["pipeline_tag"] == "image-feature-extraction"
