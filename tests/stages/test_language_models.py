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
    """`kind`: bert; roberta, saved as a model that fills in words, without a pooling layer; gpt2, whose tokenizer has
    no padding; or t5."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {token: number for number, token in enumerate([*SPECIAL, *LETTERS])}
    backend = Tokenizer(models.WordLevel(words, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    padding = {} if kind == "gpt2" else {"pad_token": "<pad>"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **padding
    )
    tokenizer.save_pretrained(folder)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, pad_token_id=1)
    shape |= dict(vocab_size=len(words), max_position_embeddings=LENGTH + 2 * (kind == "roberta"))
    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = dict(n_embd=32, n_layer=2, n_head=2, n_positions=LENGTH, vocab_size=len(words))
        model = transformers.GPT2Model(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=2))
    elif kind == "t5":
        sizes = dict(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, vocab_size=len(words))
        model = transformers.T5Model(transformers.T5Config(**sizes, pad_token_id=1, decoder_start_token_id=0))
    elif kind == "bert":
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


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
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


def test_models_that_translate_are_refused(tiny_data: TinyData, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert run_embed(tiny_data, write_language_model(tmp_path / "model", "t5"), tmp_path / "out") == 2
    assert "t5 models translate texts; take one that only encodes them" in capfd.readouterr().err
