"""What a frozen encoder is: a network, the images that it takes, and a function that gives features."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlcd_ds.data.pixels import PixelFormat


@dataclass(frozen=True)
class Encoder:
    """`encode` maps images [B, 3, S, S] in `pixels` format to features [B, E], not normalised."""

    name: str
    pixels: PixelFormat
    network: nn.Module
    encode: Callable[[Tensor], Tensor]

    def fingerprint(self) -> str:
        """SHA-256 over names and values of all weights."""
        return weights_digest(self.name, self.network)

    def to(self, device: torch.device) -> Encoder:
        """Move the network and freeze it. On a GPU its matrix products may use TF32: features are kept in fp16."""
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        self.network.to(device).eval().requires_grad_(False)
        return self


@dataclass(frozen=True)
class TextEncoder:
    """`encode` maps captions to embeddings [B, E] in the space of the same model's images, not normalised."""

    name: str
    network: nn.Module
    encode: Callable[[list[str]], Tensor]

    def fingerprint(self) -> str:
        """SHA-256 over names and values of all weights."""
        return weights_digest(self.name, self.network)


@dataclass(frozen=True)
class PairEncoder:
    """The two towers of one model: images and texts become embeddings in one space, [B, E], not normalised."""

    image: Encoder
    text: TextEncoder

    @property
    def name(self) -> str:
        return self.image.name

    def fingerprint(self) -> str:
        """SHA-256 over the fingerprints of both towers."""
        return hashlib.sha256((self.image.fingerprint() + self.text.fingerprint()).encode()).hexdigest()

    def to(self, device: torch.device) -> PairEncoder:
        """Move both networks and freeze them."""
        self.image.to(device)
        self.text.network.to(device).eval().requires_grad_(False)
        return self


def weights_digest(name: str, network: nn.Module) -> str:
    """SHA-256 over a name, and names and values of all weights."""
    digest = hashlib.sha256(name.encode())
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
