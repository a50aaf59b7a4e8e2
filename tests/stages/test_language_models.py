"""Captions embedded by language models in Hugging Face folders: BERT and RoBERTa with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from clip_folder import LETTERS
from distributed_harness import TinyData, assert_close, assert_differs

from mlcd_ds.clustering.embedding_store import EmbeddingStore
from mlcd_ds.data.shard_index import ShardIndex, ShardReader
from mlcd_ds.stages import embed

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
LENGTH = 20  # shorter than most captions, written letter by letter
TOLERANCE = 1e-3  # rows are fp16


def write_language_model(folder: Path, kind: str) -> Path:
    """`kind`: bert or roberta, the latter saved as a model that fills in words, without a pooling layer."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {token: number for number, token in enumerate([*SPECIAL, *LETTERS])}
    backend = Tokenizer(models.WordLevel(words, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, pad_token_id=1)
    shape |= dict(vocab_size=len(words), max_position_embeddings=LENGTH + 2 * (kind == "roberta"))
    torch.manual_seed(0)
    if kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(**shape))
    else:
        model = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**shape))
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2:
            parameter.data.mul_(4)
    model.save_pretrained(folder)
    return folder


def run_embed(data: TinyData, encoder: Path, out: Path, features: str = "text") -> int:
    arguments = ["--index", data.index, "--encoder", encoder, "--features", features, "--out", out]
    return embed.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_captions_are_means_of_hidden_states(tiny_data: TinyData, tmp_path: Path, kind: str) -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = write_language_model(tmp_path / "model", kind)
    assert run_embed(tiny_data, folder, tmp_path / "out") == 0
    store = EmbeddingStore(tmp_path / "out")
    got = torch.cat([rows.float() for _, rows in store.blocks(1000)])
    assert store.manifest.parameters["encoder"] == "model" and "pixels" not in store.manifest.parameters
    index = ShardIndex(tiny_data.index)
    reader, samples = ShardReader(index), index.samples(0)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    expected, first = [], []
    for row in range(len(samples.keys)):  # one by one: without padding
        caption = reader.read(0, samples.caption, row).decode()
        tokens = tokenizer([caption], truncation=True, max_length=LENGTH, return_tensors="pt")
        with torch.inference_mode():
            states = model(input_ids=tokens["input_ids"]).last_hidden_state[0]
        expected.append(states.mean(dim=0))
        first.append(states[0])
    assert_close("means", got, F.normalize(torch.stack(expected)), TOLERANCE)
    assert_differs("first tokens", got, F.normalize(torch.stack(first)), TOLERANCE)
    assert run_embed(tiny_data, folder, tmp_path / "out") == 0, "done already"


def test_images_are_refused(tiny_data: TinyData, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    folder = write_language_model(tmp_path / "model", "bert")
    for features in ("image", "joint"):
        capfd.readouterr()
        assert run_embed(tiny_data, folder, tmp_path / "out", features) == 2
        assert "model_type bert is not one of clip" in capfd.readouterr().err
