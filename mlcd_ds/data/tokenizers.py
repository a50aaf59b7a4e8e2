"""Tokenizers: from texts to the whole numbers that a text tower takes.

Three kinds, all of them a `tokenizer.json` of Hugging Face's `tokenizers`:
  clip      CLIP's byte-pair encoding, from its vocabulary file in this package
  FOLDER    the tokenizer in a Hugging Face folder, or made by `mlcd tokenizer` (or the path of a tokenizer.json)

B texts, L tokens of a text (the context).
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlcd_ds.artefacts.readers import decoding, read_bytes
from mlcd_ds.errors import UserError

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_NAME = "tokenizer.json"
CLIP_NAME = "clip"
CLIP_CONTEXT = 77
CLIP_VOCABULARY = Path(__file__).resolve().parent / "clip_vocabulary" / "bpe_simple_vocab_16e6.txt.gz"
CLIP_MERGES = 49152 - 256 - 2  # of the file's many more
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
START, END = "<|startoftext|>", "<|endoftext|>"
FIX = "Take the tokenizer of the model's own release, or make one: `mlcd tokenizer`."
# By what these become, a fingerprint tells normalisation and merges apart, in every version of the library.
PROBES = (
    "a photo of a Cat, it's 2 dogs.",
    "naïve CAFÉ  déjà-vu",
    "漢字 😀 1234567890",
    "don't&amp;do_that\tthe",
)


class Tokenizer:
    """A tokenizer that marks where texts end; perhaps also where they begin."""

    def __init__(self, backend: tokenizers.Tokenizer, name: str) -> None:
        """`name` stands in messages. Raises UserError where the tokenizer puts no mark behind a text."""
        backend.no_padding()
        backend.no_truncation()
        self.name, self._backend = name, backend
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        inside = backend.encode("a", add_special_tokens=False).ids
        marked = backend.encode("a").ids
        first = next((at for at in range(len(marked)) if marked[at : at + len(inside)] == inside), 0)
        self._before, self._after = marked[:first], marked[first + len(inside) :]
        if not inside or not self._after:
            raise UserError(f"{name}: the tokenizer puts no end token behind a text, by which the text tower reads it.")
        self.end_token = self._after[0]

    @classmethod
    def from_json(cls, content: str, name: str) -> Tokenizer:
        """From the content of a tokenizer.json."""
        import tokenizers

        with decoding(f"{name}: its tokenizer", FIX):
            backend = tokenizers.Tokenizer.from_str(content)
        return cls(backend, name)

    def to_json(self) -> str:
        """The content of a tokenizer.json."""
        return self._backend.to_str()

    @property
    def start_token(self) -> int | None:
        """The token before a text; None where there is none."""
        return self._before[0] if self._before else None

    def token(self, number: int) -> str:
        """How a token is written."""
        return str(self._backend.id_to_token(number))

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary, and of what a few texts become."""
        vocabulary = sorted(self._backend.get_vocab(with_added_tokens=True).items())
        content = [vocabulary, [self._backend.encode(text).ids for text in PROBES]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def encode(self, texts: Sequence[str], context: int) -> np.ndarray:
        """int32 [B, L] of `context` tokens: start, text, end, and behind it the end token again.

        Longer texts are cut, so that the end token is the last.
        """
        tokens_BL = np.full((len(texts), context), self.end_token, dtype=np.int32)
        room = context - len(self._before) - 1
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        for row, text in zip(tokens_BL, encoded, strict=True):
            tokens = self._before + text.ids[:room]
            row[: len(tokens)] = tokens
        return tokens_BL

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, with start and end."""
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [len(self._before) + len(text.ids) + 1 for text in encoded]


def load_tokenizer(specification: str) -> Tokenizer:
    """By the specification that the module's text lists. UserError says what is missing."""
    if specification == CLIP_NAME:
        return clip_tokenizer()
    path = Path(specification)
    folder, file = (path, path / TOKENIZER_NAME) if path.is_dir() else (path.parent, path)
    if file.is_file():
        with decoding(file, FIX):
            content = read_bytes(file, FIX).decode()
        return Tokenizer.from_json(content, str(file))
    if path.is_dir() and (folder / "vocab.json").is_file():
        return _of_older_files(folder)
    raise UserError(
        f"tokenizer {specification[:200]!r} is neither {CLIP_NAME!r}, nor a tokenizer.json, nor a folder with one (or "
        f"with vocab.json and merges.txt). {FIX}"
    )


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, str | bool | None]:
    """The content of a tokenizer_config.json, with which transformers reads the tokenizer.json beside it."""
    start, end = tokenizer.start_token, tokenizer.token(tokenizer.end_token)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None if start is None else tokenizer.token(start),
        "eos_token": end,
        "pad_token": end,
        "unk_token": end,
        "clean_up_tokenization_spaces": False,
    }


def _of_older_files(folder: Path) -> Tokenizer:
    """From vocab.json and merges.txt, which transformers knows how to join."""
    import transformers

    with decoding(f"{folder}: its tokenizer", FIX):
        theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        content = theirs.backend_tokenizer.to_str()
    return Tokenizer.from_json(content, str(folder))


def clip_tokenizer() -> Tokenizer:
    """CLIP's: byte-pair encoding of lower-case words, 49,408 tokens.

    As OpenAI's own and open_clip's, but for ftfy, which mends text that was decoded wrongly before; the same as
    transformers' CLIPTokenizer.
    """
    from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    with gzip.open(CLIP_VOCABULARY, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : CLIP_MERGES + 1]
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    letters = _byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), START, END]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Backend(models.BPE(vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.add_special_tokens([START, END])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, vocabulary[START]), (END, vocabulary[END])]
    )
    return Tokenizer(backend, CLIP_NAME)


def _byte_letters() -> list[str]:
    """A printable letter for each byte, in the order of CLIP's vocabulary: first the bytes that are printable
    themselves, then the others, which stand above 255."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in shown]
    return [*map(chr, shown), *(chr(256 + place) for place in range(len(others)))]


def train_tokenizer(texts: Iterator[str], vocab_size: int, name: str) -> Tokenizer:
    """A byte-pair encoding learned from texts, lower-case; every byte is a token, so that any text can be written.

    Fewer tokens than `vocab_size` where the texts hold no more pairs that occur twice.
    """
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend
    from tokenizers.trainers import BpeTrainer

    backend = Backend(models.BPE())
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        special_tokens=[(word, backend.token_to_id(word)) for word in (START, END)],
    )
    return Tokenizer(backend, name)
