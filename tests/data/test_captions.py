"""Captions: which are usable, and that texts come with their own images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_maker import encode, picture, plain_shard, run_stage, write_tar

from mlcd_ds.artefacts.readers import read_json_object
from mlcd_ds.data.captions import EMPTY, MISSING, NOT_UTF8, USABLE, caption_lines, caption_state, caption_text
from mlcd_ds.data.fields import Tokens, TrainingData
from mlcd_ds.data.loader import AugmentConfig, StreamSlice, TrainLoader
from mlcd_ds.data.order import SampleOrder
from mlcd_ds.data.pixels import clip_pixels
from mlcd_ds.data.shard_index import ShardIndex
from mlcd_ds.data.tokenizers import Tokenizer, clip_tokenizer
from mlcd_ds.errors import UserError

CAPTIONS: tuple[bytes | None, ...] = (
    *(
        b"picture 0",
        None,
        b"picture 2",
        b"",
        b" \n\t",
        b"caf\xe9",
        "\ufeffpicture 6".encode(),
        b"picture 7\npicture 70",
    ),
    *(b"word " * 90, b"picture 9", b"&nbsp;", b"picture &amp;#49;1"),
)
USABLE_ROWS = [0, 2, 6, 7, 8, 9, 11]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """Three shards: of odd captions, of none, of sound ones."""
    folder = tmp_path_factory.mktemp("captions")
    members = []
    for number, caption in enumerate(CAPTIONS):
        members.append((f"{number:03d}.jpg", encode(picture(number))))
        members += [] if caption is None else [(f"{number:03d}.txt", caption)]
    write_tar(folder / "a.tar", members)
    write_tar(folder / "b.tar", [(f"{number}.jpg", encode(picture(number))) for number in range(3)])
    plain_shard(folder / "c.tar", 5)
    finished = run_stage("index", "--shards", folder / "*.tar", "--out", folder / "index")
    assert finished.status == 0, finished.err
    assert "index: 12 usable captions; others: 4 missing, 3 empty, 1 not UTF-8, 1 over 77 tokens" in finished.err
    return ShardIndex(folder / "index")


def test_states_and_texts() -> None:
    states = [caption_state(caption) for caption in CAPTIONS]
    assert [row for row, state in enumerate(states) if state == USABLE] == USABLE_ROWS
    assert (states[1], states[3], states[4], states[5], states[10]) == (MISSING, EMPTY, EMPTY, NOT_UTF8, EMPTY)
    assert (
        caption_text(b"\xef\xbb\xbf a &lt;b&gt;\n\tc ") == "a <b> c"
        and caption_text(b"picture &amp;#49;1") == "picture 11"
    )
    assert caption_lines(b"one\r\n\n  two &amp; three \n") == ["one", "two & three"]


def test_the_index_counts_them(index: ShardIndex) -> None:
    assert index.manifest.captions == {"missing": 4, "empty": 3, "not UTF-8": 1, "over 77 tokens": 1}
    assert index.caption_counts().tolist() == [7, 0, 5] and index.manifest.num_captions == 12
    assert index.captioned_rows(0).tolist() == USABLE_ROWS and index.captioned_rows(2).tolist() == [0, 1, 2, 3, 4]


def texts_by_image(data: TrainingData, tokenizer: Tokenizer, num_steps: int) -> list[tuple[int, int, list[int]]]:
    """Shard and row of each image that training sees, told by its pixels, and its tokens."""
    pixels = clip_pixels(40)
    still = AugmentConfig(crop_area=(1.0, 1.0), crop_aspect=(1.0, 1.0), flip=False)
    order = SampleOrder(data.counts, 2, 4, seed=0)
    loader = TrainLoader(data, order, StreamSlice((0, 1), 3, 1), pixels, still, torch.device("cpu"), 1)
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (pixels.mean, pixels.std))
    known = {(shard, row): picture(row) for shard, count in enumerate((12, 3, 5)) for row in range(count)}
    found = []
    batches = loader.batches(0)
    for batch in islice(batches, num_steps):
        for image_3SS, place, tokens_L in zip(batch.images_B3SS, batch.ids_B, batch.fields["tokens"], strict=True):
            shard, at = (int(part[0]) for part in order.locate(place[None].numpy()))
            row = int(data.rows(np.array([shard]), np.array([at]))[0])
            levels = (image_3SS * std + mean).permute(1, 2, 0).numpy()
            distances = {r: np.abs(levels - known[shard, r]).mean() for s, r in known if s == shard}
            assert min(distances, key=distances.__getitem__) == row, "the text is not of this image"
            found.append((shard, row, tokens_L.tolist()))
    batches.close()
    loader.close()
    return found


def wanted_texts(shard: int, row: int, form: str) -> Sequence[str]:
    if shard == 2:
        return [f"picture {row}"]
    content = CAPTIONS[row]
    assert content is not None
    return [caption_text(content)] if form == "whole" else caption_lines(content)


@pytest.mark.parametrize("form", ["whole", "lines"])
def test_texts_come_with_their_own_images_and_never_without(index: ShardIndex, form: str) -> None:
    tokenizer = clip_tokenizer()
    data = TrainingData(index, {"tokens": Tokens(index, tokenizer, 12, form)})
    assert data.num_samples == 12
    seen = texts_by_image(data, tokenizer, 12)
    assert {(shard, row) for shard, row, _ in seen} == {(0, row) for row in USABLE_ROWS} | {
        (2, row) for row in range(5)
    }
    drawn = set()
    for shard, row, tokens in seen:
        choices = [tokenizer.encode([text], 12)[0].tolist() for text in wanted_texts(shard, row, form)]
        assert tokens in choices, (shard, row)
        drawn.add((shard, row, tuple(tokens)))
    assert len(drawn) == (12 if form == "whole" else 13), "each line of a caption of two is drawn at some time"


def test_wrong_pairs_are_noticed(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """The known-bad twins: texts of a batch moved by one, and places taken for rows."""
    tokenizer = clip_tokenizer()
    data = TrainingData(index, {"tokens": Tokens(index, tokenizer, 12, "whole")})
    read = Tokens.read
    monkeypatch.setattr(Tokens, "read", lambda *arguments: np.roll(read(*arguments), 1, axis=0))
    seen = texts_by_image(data, tokenizer, 2)
    right = [tokenizer.encode(wanted_texts(shard, row, "whole"), 12)[0].tolist() for shard, row, _ in seen]
    assert sum(tokens == wanted for (*_, tokens), wanted in zip(seen, right, strict=True)) <= 2
    monkeypatch.setattr(Tokens, "read", read)
    monkeypatch.setattr(TrainingData, "rows", lambda self, shards_B, places_B: places_B)
    with pytest.raises(UnicodeDecodeError):
        texts_by_image(data, tokenizer, 4)


def test_without_texts_all_images_are_samples(index: ShardIndex) -> None:
    data = TrainingData(index, {})
    assert data.num_samples == 20 and data.rows(np.array([0, 1]), np.array([3, 2])).tolist() == [3, 2]


def test_an_index_without_captions_is_refused(tmp_path: Path, index: ShardIndex) -> None:
    write_tar(tmp_path / "b.tar", [(f"{number}.jpg", encode(picture(number))) for number in range(3)])
    assert run_stage("index", "--shards", tmp_path / "b.tar", "--out", tmp_path / "index").status == 0
    with pytest.raises(UserError, match=r"indexes no usable caption \(3 missing\): captions are the samples' \.txt"):
        ShardIndex(tmp_path / "index").caption_counts()
    manifest = read_json_object(index.folder / "manifest.json", "")
    older = index.manifest.model_copy(update={"captions": None})
    assert older.problem() is None and manifest["captions"]
    other = ShardIndex(index.folder)
    other.manifest = older
    with pytest.raises(UserError, match=r"made by an earlier version.*mlcd index --overwrite"):
        other.caption_counts()
    finished = run_stage("tokenizer", "--index", tmp_path / "index", "--out", tmp_path / "tokenizer")
    assert finished.status == 2 and "indexes no usable caption" in finished.err


def test_a_manifest_whose_captions_do_not_add_up(index: ShardIndex) -> None:
    assert index.manifest.problem() is None
    wrong = index.manifest.model_copy(update={"num_captions": 13})
    assert wrong.problem() == "its shards do not add up to the 13 captions that it names"
