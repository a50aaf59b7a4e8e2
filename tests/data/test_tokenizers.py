"""Tokenizers against open_clip's and transformers' own, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import transformers
from shard_maker import DEMO_SHARDS, read_independently

from mlcd_ds.data import tokenizers
from mlcd_ds.data.captions import caption_text
from mlcd_ds.data.tokenizers import (
    CLIP_CONTEXT,
    TOKENIZER_NAME,
    Tokenizer,
    clip_tokenizer,
    load_tokenizer,
    tokenizer_config,
    train_tokenizer,
)
from mlcd_ds.errors import UserError

# Texts, and what open_clip 3.3.0's SimpleTokenizer makes of them, up to the end token, in a context of 77. Without
# texts that ftfy changes, which it applies first.
OPEN_CLIP = json.loads((Path(__file__).parent / "clip_tokens.json").read_text())
CAPTIONS = [sample["txt"].decode() for sample in read_independently(DEMO_SHARDS / "test" / "00000.tar")]
ODD = ["", " ", "\0", "🏴‍☠️ مرحبا 你好", "<|endoftext|>", "a" * 3000, "ﬁ ½ Ⅷ", "\u202eabc", "\ud7ff\ufffd"]


def wrong_tokens(tokenizer: Tokenizer) -> list[str]:
    """Of the texts that open_clip has made tokens of, those of which this makes others."""
    tokens_BL = tokenizer.encode([caption_text(text.encode()) for text in OPEN_CLIP], CLIP_CONTEXT)
    rows = zip(OPEN_CLIP.items(), tokens_BL.tolist(), strict=True)
    return [text for (text, right), row in rows if row[: len(right)] != right]


def test_clips_tokens_are_open_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = clip_tokenizer()
    assert tokenizer.vocab_size == 49408 and (tokenizer.start_token, tokenizer.end_token) == (49406, 49407)
    assert tokenizer.encode(["a photo of a cat"], 8).tolist() == [[49406, 320, 1125, 539, 320, 2368, 49407, 49407]]
    assert len(OPEN_CLIP) == 15 and wrong_tokens(tokenizer) == []
    monkeypatch.setattr(tokenizers, "CLIP_MERGES", 20_000)  # the known-bad twin
    assert len(wrong_tokens(clip_tokenizer())) > 5


def test_clips_tokens_are_those_of_transformers() -> None:
    ours = clip_tokenizer()
    model = json.loads(ours.to_json())["model"]
    theirs = transformers.CLIPTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    texts = [*CAPTIONS, *(text for text in ODD if text != "<|endoftext|>")]
    wanted = theirs(texts, truncation=True, max_length=CLIP_CONTEXT, padding="max_length")["input_ids"]
    assert np.array_equal(ours.encode(texts, CLIP_CONTEXT), wanted)


def test_every_text_is_cut_at_the_end_token() -> None:
    tokenizer = clip_tokenizer()
    for context in (2, 3, 8, CLIP_CONTEXT):
        tokens_BL = tokenizer.encode(["a photo of a cat", "word " * 200, "", *ODD], context)
        assert tokens_BL.dtype == np.int32 and tokens_BL.shape[1] == context
        assert (tokens_BL[:, 0] == 49406).all() and (tokens_BL[:, -1] == 49407).all()
        assert 0 <= tokens_BL.min() and tokens_BL.max() < tokenizer.vocab_size
    assert tokenizer.lengths(["a photo of a cat", "word " * 200]) == [7, 202]


def test_a_tokenizer_is_learned_from_captions(tmp_path: Path) -> None:
    learned, again = (train_tokenizer(iter(CAPTIONS), 600, "learned") for _ in range(2))
    assert learned.vocab_size == 600 and learned.fingerprint == again.fingerprint
    assert sum(learned.lengths(CAPTIONS)) < 0.6 * sum(len(caption.encode()) + 2 for caption in CAPTIONS)
    (tmp_path / TOKENIZER_NAME).write_text(learned.to_json())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(learned)))
    for source in (tmp_path, tmp_path / TOKENIZER_NAME):
        assert load_tokenizer(str(source)).fingerprint == learned.fingerprint
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [*CAPTIONS, "漢字 😀 ", "\0"]
    wanted = theirs(texts, truncation=True, max_length=16, padding="max_length")["input_ids"]
    assert np.array_equal(learned.encode(texts, 16), wanted)
    assert theirs.decode(wanted[0], skip_special_tokens=True).strip() == CAPTIONS[0].lower()
    unknown = learned.encode(["漢字 😀 ж"], 40)[0]
    assert (unknown == learned.end_token).argmax() > 10, "bytes that no caption holds are tokens, too"


def test_older_files_of_a_folder_are_read(tmp_path: Path) -> None:
    model = json.loads(clip_tokenizer().to_json())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    assert wrong_tokens(load_tokenizer(str(tmp_path))) == []


def test_a_fingerprint_tells_tokenizers_apart() -> None:
    ours = clip_tokenizer()
    content = json.loads(ours.to_json())
    assert Tokenizer.from_json(json.dumps(content), "same").fingerprint == ours.fingerprint
    kept = content["normalizer"]["normalizers"]
    content["normalizer"]["normalizers"] = kept[:-1]  # capitals stay
    assert Tokenizer.from_json(json.dumps(content), "cased").fingerprint != ours.fingerprint
    content["normalizer"]["normalizers"] = kept
    content["model"]["merges"][:2] = reversed(content["model"]["merges"][:2])
    assert json.loads(ours.to_json())["model"]["merges"][:2] != content["model"]["merges"][:2]
    assert Tokenizer.from_json(json.dumps(content), "same words").vocab_size == ours.vocab_size


def test_what_is_no_tokenizer_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tokenizer 'clap' is neither 'clip', nor a tokenizer"):
        load_tokenizer("clap")
    with pytest.raises(UserError, match="neither 'clip'"):
        load_tokenizer(str(tmp_path))
    for content in (b"", b"{}", b"\xff\xfe", b"[" * 9, clip_tokenizer().to_json().encode()[:2000]):
        (tmp_path / TOKENIZER_NAME).write_bytes(content)
        with pytest.raises(UserError, match=r"tokenizer\.json.* cannot be read: .*mlcd tokenizer"):
            load_tokenizer(str(tmp_path))
    unmarked = json.loads(clip_tokenizer().to_json()) | {"post_processor": None}
    (tmp_path / TOKENIZER_NAME).write_text(json.dumps(unmarked))
    with pytest.raises(UserError, match="puts no end token behind a text"):
        load_tokenizer(str(tmp_path))
