"""Encoder folders and specifications that cannot be used: one message that names the file and the fix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from clip_folder import write_clip
from safetensors.torch import load_file, save_file
from shard_maker import plain_shard, run_stage

from mlcd_ds.data.tokenizers import clip_tokenizer
from mlcd_ds.encoders.huggingface import load_text_encoder
from mlcd_ds.encoders.registry import load_encoder
from mlcd_ds.errors import UserError


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP image tower as transformers saves it, with its processor."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    folder = tmp_path_factory.mktemp("sound") / "clip"
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    model = CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=16, **shape))
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 36}, crop_size=32).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "clip"))


def edit(name: str, **changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        kept = {key: value for key, value in content.items() if value is not None}
        (folder / name).write_text(json.dumps(kept))

    return damage


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).write_bytes(content)] and None


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).write_bytes((folder / name).read_bytes()[:-200])] and None


def of_another_width(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: torch.cat([t, t]) for name, t in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def without_a_layer(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers.1." not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


MODEL, CONFIG, PROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (lambda folder: (folder / MODEL).unlink(), MODEL),
    "empty weights": (write(MODEL, b""), MODEL),
    "cut weights": (cut(MODEL), MODEL),
    "weights of another width": (of_another_width, "in model.safetensors, and [32] by config.json"),
    "a layer less": (without_a_layer, "weights lack"),
    "empty config": (write(CONFIG, b""), CONFIG),
    "cut config": (write(CONFIG, b'{"model_type": "clip_vis'), CONFIG),
    "no text": (write(CONFIG, b"\xff\xfe\x00"), CONFIG),
    "nested deeply": (write(CONFIG, b"[" * 100_000), CONFIG),
    "a list": (write(CONFIG, b"[]"), CONFIG),
    "no kind": (edit(CONFIG, model_type=None), "model_type None is not one of"),
    "a kind that is a list": (edit(CONFIG, model_type=["clip"]), "model_type ['clip'] is not one of"),
    "a size that is text": (edit(CONFIG, hidden_size="wide"), CONFIG),
    "no heads": (edit(CONFIG, num_attention_heads=0), CONFIG),
    "no pixels": (edit(CONFIG, image_size=0), CONFIG),
    "an activation nobody knows": (edit(CONFIG, hidden_act="nobody"), CONFIG),
    "empty processor": (write(PROCESSOR, b""), PROCESSOR),
    "cut processor": (write(PROCESSOR, b'{"crop_size": {"hei'), PROCESSOR),
    "no mean": (edit(PROCESSOR, image_mean=None), f"{PROCESSOR}: image_mean is missing"),
    "other pixels than the model's": (edit(PROCESSOR, crop_size=40), f"{PROCESSOR}: crop_size gives images of 40 x 40"),
}


def message_of(specification: str) -> str:
    with pytest.raises(UserError) as caught:
        load_encoder(specification)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600, message
    return message


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_message(folder: Path, damage: str) -> None:
    spoil, told = DAMAGES[damage]
    load_encoder(str(folder))  # the sound one is taken
    spoil(folder)
    message = message_of(str(folder))
    assert str(folder) in message and told in message and "Take the file" in message


def test_the_stage_says_it_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    cut(MODEL)(folder)
    index = tmp_path / "index"
    assert run_stage("index", "--shards", plain_shard(tmp_path / "0.tar", 3), "--out", index).status == 0
    done = run_stage("embed", "--index", index, "--encoder", folder, "--out", tmp_path / "out")
    assert done.status == 2 and "Traceback" not in done.err and MODEL in done.err and not (tmp_path / "out").exists()


def test_changed_processing_is_another_work(folder: Path, tmp_path: Path) -> None:
    index, out = tmp_path / "index", tmp_path / "out"
    assert run_stage("index", "--shards", plain_shard(tmp_path / "0.tar", 3), "--out", index).status == 0
    flags = ("embed", "--index", index, "--encoder", folder, "--out", out)
    assert run_stage(*flags).status == 0
    assert "done already" in run_stage(*flags).err
    for change in ({"resample": 2}, {"size": {"shortest_edge": 40}}, {"size": {"height": 36, "width": 36}}):
        edit(PROCESSOR, **change)(folder)
        done = run_stage(*flags)
        assert done.status == 2 and "was made with pixels=" in done.err


def test_texts_of_another_vocabulary(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip")
    assert load_text_encoder(clip).encode(["a cat"]).shape == (1, 16)
    (clip / "tokenizer.json").write_text(clip_tokenizer().to_json())
    with pytest.raises(UserError, match=r"its tokenizer has 49408 tokens, and the text tower 98: they belong to diff"):
        load_text_encoder(clip)


def test_texts_of_a_damaged_folder(folder: Path) -> None:
    write(CONFIG, b'{"model_type": "clip"')(folder)
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        load_text_encoder(folder)
    write(CONFIG, b'{"model_type": "clip"}')(folder)
    with pytest.raises(UserError, match="has no tokenizer"):
        load_text_encoder(folder)
    write("tokenizer.json", b"{")(folder)
    with pytest.raises(UserError, match="its tokenizer cannot be read"):
        load_text_encoder(folder)


@pytest.mark.parametrize(
    "specification",
    [
        *("pixels@0", "pixels@1", "pixels@-4", "pixels@big", "pixels@", "pixels@4.0", "pixels@²", "pixels@9999999999"),
        *(
            "pixels@513",
            "efficientnet-lite0@1",
            "efficientnet-lite0@9999",
            "recipe:demo@0",
            "@",
            "@32",
            "pixels@" + "9" * 5000,
        ),
    ],
)
def test_sizes_that_are_not_taken(specification: str) -> None:
    assert specification[:10] in message_of(specification)


def test_sizes_that_are_taken(sound: Path, tmp_path: Path) -> None:
    assert load_encoder("pixels@2").pixels.image_size == 2
    assert load_encoder(f"{sound}@32").pixels.resize == 36
    assert "takes images of 32 pixels, not 40" in message_of(f"{sound}@40")
    named = Path(shutil.copytree(sound, tmp_path / "clip@64"))  # a folder's own name
    assert load_encoder(str(named)).pixels.image_size == load_encoder(f"{named}@32").pixels.image_size == 32
