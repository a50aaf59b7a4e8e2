"""A tiny CLIP model with random weights and a tokenizer of single letters, as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789-.,:;()'\"&!?"


def write_clip(folder: Path, image_size: int = 32, patch_size: int = 16, length: int = 77) -> Path:
    """A CLIPModel with 16 channels of embedding."""
    from transformers import CLIPConfig, CLIPModel

    folder.mkdir(parents=True, exist_ok=True)
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = shape | dict(vocab_size=len(tokens), max_position_embeddings=length, eos_token_id=len(tokens) - 1)
    text |= dict(bos_token_id=len(tokens) - 2, pad_token_id=len(tokens) - 1, projection_dim=16)
    vision = shape | dict(image_size=image_size, patch_size=patch_size, projection_dim=16)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=16))
    for parameter in model.parameters():  # the usual start is so small that all texts look alike
        parameter.data.mul_(4)
    model.save_pretrained(folder)
    return folder
