"""CLIP's text transformer, parameter for parameter Hugging Face's `CLIPTextModelWithProjection`.

Shapes: B texts, L tokens of a text (the context), D width, E embedding.
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mlcd_ds.artefacts.typed import Frozen
from mlcd_ds.models.layers import Activation, Encoder, Linear, fill_nan, normal_init
from mlcd_ds.models.tower import Tower

TOKEN_STD, POSITION_STD = 0.02, 0.01  # of OpenAI's CLIP


class TextConfig(Frozen):
    """Shape of a `TextTower`. With CLIP's vocabulary: B (beside ViT-B) has width 512 and 8 heads, L width 768 and 12,
    both depth 12 and an MLP of four times the width."""

    vocab_size: int = Field(49408, ge=2, le=2**20, description="tokens of the tokenizer (CLIP: 49408)")
    context: int = Field(77, ge=2, le=1024, description="tokens of a text, padding included; longer texts are cut")
    width: int = Field(ge=1, le=8192, description="channels of a token")
    depth: int = Field(ge=1, le=256, description="number of transformer blocks")
    heads: int = Field(ge=1, le=256, description="attention heads a block")
    mlp_width: int = Field(ge=1, le=32768, description="hidden channels of a block's MLP")
    embed_dim: int = Field(ge=1, le=16384, description="channels of the embedding, as many as the image tower's")
    activation: Activation = Field("quick_gelu", description="the MLP's activation; OpenAI's CLIP has quick_gelu")
    end_token: int = Field(49407, ge=0, description="the token that ends a text; its place gives the embedding")
    norm_eps: float = Field(1e-5, gt=0.0, le=1e-2, description="epsilon of every layer norm")

    @model_validator(mode="after")
    def _check(self) -> TextConfig:
        if self.width % self.heads:
            raise ValueError(
                f"width {self.width} is not a multiple of heads {self.heads}: "
                f"set heads to a divisor of {self.width}, or width to {(self.width // self.heads + 1) * self.heads}"
            )
        if self.end_token >= self.vocab_size:
            raise ValueError(
                f"end_token {self.end_token} is not below vocab_size {self.vocab_size}: give the tokenizer's own"
            )
        return self


class TextEmbeddings(nn.Module):
    """A learned vector a token, and one a place."""

    def __init__(self, vocab_size: int, context: int, width: int) -> None:
        super().__init__()
        # On no device and with no random numbers yet, as all of our layers.
        self.token_embedding = nn.Embedding(vocab_size, width, _weight=torch.empty(vocab_size, width))
        self.position_embedding = nn.Embedding(context, width, _weight=torch.empty(context, width))

    def init_weights(self, generator: torch.Generator) -> None:
        """Normal, with OpenAI CLIP's deviations."""
        normal_init(self.token_embedding.weight, TOKEN_STD, generator)
        normal_init(self.position_embedding.weight, POSITION_STD, generator)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """[B, L, D]."""
        places_L = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
        return self.token_embedding(tokens_BL) + self.position_embedding(places_L)


class TextTower(Tower):
    """Causal transformer over tokens, and a linear projection of the end token.

    No token sees a later one, so what stands behind the end token changes nothing.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config.vocab_size, config.context, config.width)
        self.encoder = Encoder(
            config.depth,
            config.width,
            config.heads,
            config.mlp_width,
            config.activation,
            config.norm_eps,
            is_causal=True,
        )
        self.final_layer_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.projection = Linear(config.width, config.embed_dim, bias=False)
        fill_nan(self)

    def _init_parts(self, generator: torch.Generator) -> None:
        self.embeddings.init_weights(generator)
        self.encoder.init_weights(generator)
        self.final_layer_norm.reset_parameters()
        self.projection.init_weights(self.config.width**-0.5, generator)

    def forward_features(self, tokens_BL: Tensor) -> Tensor:
        """The features of each text, [B, D]: the first end token after the last norm, before the projection.

        A text without an end token gives those of its first token. Raises ValueError where texts are longer than the
        context.
        """
        if tokens_BL.ndim != 2 or not 1 <= tokens_BL.shape[1] <= self.config.context:
            raise ValueError(
                f"tokens of shape {tuple(tokens_BL.shape)}; the model takes [B, L], L up to {self.config.context}"
            )
        states_BLD = self.encoder(self.embeddings(tokens_BL))
        ends_B = (tokens_BL == self.config.end_token).int().argmax(dim=1)
        ends_B1D = ends_B[:, None, None].expand(-1, 1, states_BLD.shape[2])
        return self.final_layer_norm(states_BLD.gather(1, ends_B1D)[:, 0])

    def forward(self, tokens_BL: Tensor, *, is_projected: bool = True) -> Tensor:
        """Return the embeddings for the loss, [B, E]: projected, not normalised; or else `forward_features`, [B, D].

        `tokens_BL`: whole numbers, each text ended by the end token and then padded with anything.
        """
        features_BD = self.forward_features(tokens_BL)
        return self.projection(features_BD) if is_projected else features_BD


def flops_per_text(config: TextConfig) -> int:
    """Floating-point operations of one text's forward pass, a multiply-add counting 2; matmuls only.

    The half of the attention that lies in the future counts nothing.
    """
    length, width = config.context, config.width
    projections = 4 * 2 * length * width * width
    attention = 2 * length * (length + 1) * width
    mlp = 2 * 2 * length * width * config.mlp_width
    return config.depth * (projections + attention + mlp) + 2 * width * config.embed_dim
