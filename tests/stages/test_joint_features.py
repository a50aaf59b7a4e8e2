"""Embeddings of captions, and of images and captions together, against transformers; what is refused."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from clip_folder import write_clip
from distributed_harness import TinyData, assert_close, assert_differs
from torch import Tensor

from mlcd_ds.clustering.embedding_store import EmbeddingStore
from mlcd_ds.data.shard_index import ShardIndex, ShardReader
from mlcd_ds.stages import embed, index

TOLERANCE = 1e-3  # rows are fp16


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"), length=24)


def embedded(index_folder: Path, clip: Path, features: str, out: Path) -> Tensor:
    """fp32 [N, E] of the stage."""
    arguments = ["--index", index_folder, "--encoder", clip, "--features", features, "--out", out]
    assert embed.main([str(argument) for argument in arguments]) == 0
    return torch.cat([rows.float() for _, rows in EmbeddingStore(out).blocks(1000)])


def captions_of(index_folder: Path) -> list[str]:
    opened = ShardIndex(index_folder)
    reader, samples = ShardReader(opened), opened.samples(0)
    return [reader.read(0, samples.caption, row).decode() for row in range(len(samples.keys))]


def test_captions_are_embedded_as_transformers_does(tiny_data: TinyData, clip: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    got = embedded(tiny_data.index, clip, "text", tmp_path / "text")
    tokenizer, model = AutoTokenizer.from_pretrained(clip), CLIPTextModelWithProjection.from_pretrained(clip).eval()
    expected = []
    for caption in captions_of(tiny_data.index):
        tokens = tokenizer([caption], truncation=True, max_length=24, return_tensors="pt")
        with torch.inference_mode():
            expected.append(F.normalize(model(input_ids=tokens["input_ids"]).text_embeds, dim=1))
    assert_close("captions, one by one", got, torch.cat(expected), TOLERANCE)
    assert_differs("another caption", got, torch.cat(expected).roll(1, 0), TOLERANCE)


def test_joint_features_are_the_mean_of_both(tiny_data: TinyData, clip: Path, tmp_path: Path) -> None:
    names = ("image", "text", "joint")
    images, texts, joint = (embedded(tiny_data.index, clip, name, tmp_path / name) for name in names)
    assert_close("mean at unit length", joint, F.normalize(images + texts, dim=1), TOLERANCE)
    assert_differs("images alone", joint, images, TOLERANCE)
    assert_differs("captions alone", joint, texts, TOLERANCE)


@pytest.fixture(params=[None, b"\xff\xfe", b"&nbsp;"], ids=["missing", "not UTF-8", "empty"])
def bare_index(tiny_data: TinyData, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The index of a shard whose third sample has no usable caption."""
    shard = tmp_path / "00000.tar"
    with tarfile.open(tiny_data.shard) as source, tarfile.open(shard, "w") as target:
        keys: list[str] = []
        for member in source:
            key = member.name.split(".")[0]
            keys += [key] if key not in keys else []
            if len(keys) > 5:
                break
            if not (len(keys) == 3 and member.name.endswith(".txt")):
                target.addfile(member, source.extractfile(member))
            elif request.param is not None:
                member.size = len(request.param)
                target.addfile(member, io.BytesIO(request.param))
    assert index.main(["--shards", str(shard), "--out", str(tmp_path / "index")]) == 0
    return tmp_path / "index"


def test_a_sample_without_a_caption(bare_index: Path, clip: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    images, joint = (embedded(bare_index, clip, name, tmp_path / name) for name in ("image", "joint"))
    differs = [not torch.allclose(a, b, atol=1e-2) for a, b in zip(images, joint, strict=True)]
    assert differs == [row != 2 for row in range(len(images))] and len(images) == 5
    capfd.readouterr()
    arguments = ["--index", bare_index, "--encoder", clip, "--features", "text", "--out", tmp_path / "text"]
    assert embed.main([str(argument) for argument in arguments]) == 2
    told = capfd.readouterr().err
    assert "has no usable caption: --features joint takes the image alone" in told and "00000.tar, key" in told


def test_encoders_without_texts_are_refused(tiny_data: TinyData, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    arguments = ["--index", tiny_data.index, "--encoder", "pixels@8", "--features", "joint", "--out", tmp_path / "x"]
    assert embed.main([str(argument) for argument in arguments]) == 2
    assert "pixels@8 is not the folder of a whole CLIP model" in capfd.readouterr().err
