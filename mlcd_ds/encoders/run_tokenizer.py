"""The tokenizer of a run: read from its folder, compared with its checkpoint and text tower."""

from __future__ import annotations

from pathlib import Path

from mlcd_ds.data.tokenizers import TOKENIZER_NAME, Tokenizer, load_tokenizer
from mlcd_ds.engine.weights import CheckpointManifest
from mlcd_ds.errors import UserError
from mlcd_ds.models.text import TextConfig


def run_tokenizer(run: Path, checkpoint: CheckpointManifest, text: TextConfig) -> Tokenizer:
    """The tokenizer in the folder of a run. UserError where it is not the one that the run was trained with, or not for
    its text tower."""
    path, fix = run / TOKENIZER_NAME, "Put back the one that the run was trained with (data.tokenizer)."
    if not path.exists():
        raise UserError(f"{path} is missing, by which texts become tokens. {fix}")
    tokenizer = load_tokenizer(str(path))
    trained = checkpoint.inputs.get("tokenizer", tokenizer.fingerprint)
    if tokenizer.fingerprint != trained:
        raise UserError(f"{path} is another tokenizer than the checkpoints were trained with. {fix}")
    if tokenizer.vocab_size > text.vocab_size or tokenizer.end_token != text.end_token:
        raise UserError(
            f"{path} has {tokenizer.vocab_size} tokens and end token {tokenizer.end_token}; the text tower takes "
            f"{text.vocab_size}, and {text.end_token}. {fix}"
        )
    return tokenizer
