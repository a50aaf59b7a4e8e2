"""Layers of CLIP's vision transformer, with parameter names as Hugging Face stores them.

No layer draws a random number when it is built: `init_weights` does, from the generator that it is given.

Shapes: B images, C colour channels (3), N patches, R registers, T = 1 + R + N tokens, D width, H heads, K head dim.
"""

import math
from collections.abc import Callable, Iterable
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlcd_ds.models.positions import resize_positions
from mlcd_ds.models.rope import Rotation

Activation = Literal["quick_gelu", "gelu"]
Recompute = Literal["none", "mlp", "block"]


def fill_nan(module: nn.Module) -> None:
    """Fill every floating-point parameter with NaN, so that one which is never initialised cannot pass unseen."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(math.nan)


def normal_init(parameter: Tensor, std: float, generator: torch.Generator) -> None:
    """Draw the parameter from N(0, std^2), in fp32 on the generator's device: the values depend on the generator only,
    not on where the parameter lies."""
    values = torch.empty(parameter.shape, dtype=torch.float32, device=generator.device)
    with torch.no_grad():
        parameter.copy_(values.normal_(0.0, std, generator=generator))


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation of GELU: x * sigmoid(1.702 x)."""
    # silu's backward keeps one tensor, x * sigmoid(1.702 x) written out would keep three of the widest ones.
    return F.silu(x * 1.702) / 1.702


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Apply the named activation."""
    return quick_gelu(x) if activation == "quick_gelu" else F.gelu(x)


class Linear(nn.Linear):
    """`nn.Linear` that leaves its parameters alone until `init_weights`."""

    def reset_parameters(self) -> None:
        """Do nothing: torch's default would draw from the global random state."""

    def init_weights(self, std: float, generator: torch.Generator) -> None:
        """Weights from N(0, std^2), bias 0."""
        normal_init(self.weight, std, generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class PatchEmbedding(nn.Module):
    """Non-overlapping patches to tokens as one matmul, equal to a p x p convolution of stride p without bias."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.weight = nn.Parameter(torch.empty(width, 3, patch_size, patch_size))

    def init_weights(self, generator: torch.Generator) -> None:
        """Normal, with the variance 1 / (3 * fan_in) of the default convolution that OpenAI's CLIP uses here."""
        normal_init(self.weight, (3 * self.weight[0].numel()) ** -0.5, generator)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the patch tokens [B, N, D], row by row."""
        batch, channels, height, _ = images_BCHW.shape
        p, grid = self.patch_size, height // self.patch_size
        grid_images = images_BCHW.to(self.weight.dtype).reshape(batch, channels, grid, p, grid, p)
        pixels = grid_images.permute(0, 2, 4, 1, 3, 5).reshape(batch, grid * grid, channels * p * p)
        return F.linear(pixels, self.weight.flatten(1))


class PositionEmbedding(nn.Module):
    """One learned vector a token position, added to the tokens; resized where there are more or fewer patches."""

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tokens, width))

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        """Return tokens plus positions, [B, T, D]."""
        return tokens_BTD + resize_positions(self.weight, tokens_BTD.shape[1] - 1)


class Embeddings(nn.Module):
    """Images to tokens: a class token in front, registers, patches; learned positions (none with rotary ones).

    Registers (arXiv 2309.16588) are learned tokens without a place: they hold what belongs to no patch.
    """

    def __init__(
        self, patch_size: int, num_patches: int, width: int, *, num_registers: int = 0, has_positions: bool = True
    ) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.register_embedding = nn.Parameter(torch.empty(num_registers, width)) if num_registers else None
        self.patch_embedding = PatchEmbedding(patch_size, width)
        self.position_embedding = PositionEmbedding(num_patches + 1, width) if has_positions else None

    def init_weights(self, generator: torch.Generator) -> None:
        """Class token, registers and positions from N(0, 1 / width)."""
        std = self.class_embedding.numel() ** -0.5
        normal_init(self.class_embedding, std, generator)
        if self.register_embedding is not None:
            normal_init(self.register_embedding, std, generator)
        self.patch_embedding.init_weights(generator)
        if self.position_embedding is not None:
            normal_init(self.position_embedding.weight, std, generator)

    def forward(self, images_BCHW: Tensor, kept_BK: Tensor | None = None) -> Tensor:
        """Return tokens [B, T, D], the class token first; with `kept_BK` only these patches of each image."""
        patches_BND = self.patch_embedding(images_BCHW)
        class_B1D = self.class_embedding.to(patches_BND.dtype).expand(patches_BND.shape[0], 1, -1)
        tokens_BTD = torch.cat([class_B1D, patches_BND], dim=1)
        if self.position_embedding is not None:
            tokens_BTD = self.position_embedding(tokens_BTD)
        class_B1D, patches_BND = tokens_BTD[:, :1], tokens_BTD[:, 1:]
        if kept_BK is not None:
            patches_BND = patches_BND.gather(1, kept_BK[:, :, None].expand(-1, -1, tokens_BTD.shape[2]))
        elif self.register_embedding is None:
            return tokens_BTD
        if self.register_embedding is None:
            return torch.cat([class_B1D, patches_BND], dim=1)
        registers_BRD = self.register_embedding.to(tokens_BTD.dtype).expand(len(tokens_BTD), -1, -1)
        return torch.cat([class_B1D, registers_BRD, patches_BND], dim=1)


def attend(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, is_causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(K)) v, [B, H, T, K]; causal: over the tokens up to each one."""
    if q_BHTK.device.type == "cpu" and q_BHTK.dtype.itemsize == 2:
        # torch's backward in 16 bits is several times slower there than in 32.
        return attend(q_BHTK.float(), k_BHTK.float(), v_BHTK.float(), is_causal).to(q_BHTK.dtype)
    return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=is_causal)


class Attention(nn.Module):
    """Multi-head self-attention with separate query, key and value projections."""

    def __init__(self, width: int, heads: int, *, is_causal: bool = False) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.head_dim = width // heads  # not the number of heads: under tensor parallelism a rank has only some
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.out_proj = Linear(width, width)

    def init_weights(self, depth: int, generator: torch.Generator) -> None:
        """q, k, v from N(0, 1 / width); out from N(0, 1 / (2 * depth * width)), as it adds to the residual stream."""
        width = self.q_proj.in_features
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            projection.init_weights(width**-0.5, generator)
        self.out_proj.init_weights((2 * depth * width) ** -0.5, generator)

    def forward(self, tokens_BTD: Tensor, rotation: Rotation | None = None) -> Tensor:
        """Return the attended tokens [B, T, D]; softmax(q k^T / sqrt(K)) v in each head, q and k perhaps turned."""
        q_BHTK, k_BHTK, v_BHTK = (
            projection(tokens_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotation is not None:
            q_BHTK, k_BHTK = rotation.apply(q_BHTK), rotation.apply(k_BHTK)
        mixed_BHTK = attend(q_BHTK, k_BHTK, v_BHTK, is_causal=self.is_causal)
        return self.out_proj(mixed_BHTK.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, width: int, mlp_width: int, activation: Activation) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.fc1 = Linear(width, mlp_width)
        self.fc2 = Linear(mlp_width, width)

    def init_weights(self, depth: int, generator: torch.Generator) -> None:
        """fc1 from N(0, 1 / (2 * width)); fc2 from N(0, 1 / (2 * depth * width))."""
        width = self.fc1.in_features
        self.fc1.init_weights((2 * width) ** -0.5, generator)
        self.fc2.init_weights((2 * depth * width) ** -0.5, generator)

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        """Return the transformed tokens [B, T, D]."""
        return self.fc2(activate(self.fc1(tokens_BTD), self.activation))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    `recompute` trades time for memory in training: "mlp" keeps nothing of the MLP branch (half of what a block holds)
    and computes it again in the backward pass, "block" does so with the whole block.
    """

    recompute: Recompute = "none"

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        activation: Activation,
        norm_eps: float,
        *,
        is_causal: bool = False,
    ) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.self_attn = Attention(width, heads, is_causal=is_causal)
        self.layer_norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, mlp_width, activation)

    def init_weights(self, depth: int, generator: torch.Generator) -> None:
        """Norms to the identity, the rest by CLIP's scheme for a stack of `depth` blocks."""
        self.layer_norm1.reset_parameters()
        self.self_attn.init_weights(depth, generator)
        self.layer_norm2.reset_parameters()
        self.mlp.init_weights(depth, generator)

    def forward(self, tokens_BTD: Tensor, scales_B2: Tensor | None = None, rotation: Rotation | None = None) -> Tensor:
        """Return the tokens after the block, [B, T, D]. `scales_B2`: an image's factors on the two branches."""
        if self.recompute == "block":
            return _recomputed(self._whole, tokens_BTD, scales_B2, rotation)
        return self._whole(tokens_BTD, scales_B2, rotation)

    def _whole(self, tokens_BTD: Tensor, scales_B2: Tensor | None, rotation: Rotation | None) -> Tensor:
        attended_BTD = self.self_attn(self.layer_norm1(tokens_BTD), rotation)
        if scales_B2 is not None:
            attended_BTD = attended_BTD * scales_B2[:, 0, None, None].to(attended_BTD.dtype)
        tokens_BTD = tokens_BTD + attended_BTD
        if self.recompute == "mlp":
            transformed_BTD = _recomputed(self._transformed, tokens_BTD)
        else:
            transformed_BTD = self._transformed(tokens_BTD)
        if scales_B2 is not None:
            transformed_BTD = transformed_BTD * scales_B2[:, 1, None, None].to(transformed_BTD.dtype)
        return tokens_BTD + transformed_BTD

    def _transformed(self, tokens_BTD: Tensor) -> Tensor:
        return self.mlp(self.layer_norm2(tokens_BTD))


def _recomputed(function: Callable[..., Tensor], *inputs: object) -> Tensor:
    """The function's value; its backward pass calls it again. Our layers draw no random numbers, so none are saved."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class Encoder(nn.Module):
    """A stack of blocks; causal: no token sees a later one."""

    def __init__(
        self,
        depth: int,
        width: int,
        heads: int,
        mlp_width: int,
        activation: Activation,
        norm_eps: float,
        *,
        is_causal: bool = False,
    ) -> None:
        super().__init__()
        shape = (width, heads, mlp_width, activation, norm_eps)
        self.layers = nn.ModuleList(Block(*shape, is_causal=is_causal) for _ in range(depth))

    @property
    def blocks(self) -> Iterable[Block]:
        """The layers by their type."""
        return cast(Iterable[Block], self.layers)

    def init_weights(self, generator: torch.Generator) -> None:
        """Initialise every block."""
        for block in self.blocks:
            block.init_weights(len(self.layers), generator)

    def forward(self, tokens_BTD: Tensor, scales_BL2: Tensor | None = None, rotation: Rotation | None = None) -> Tensor:
        """Return the tokens after the last block, [B, T, D]. `scales_BL2`: see `TrainingNoise.branch_scales`."""
        for number, block in enumerate(self.layers):
            tokens_BTD = block(tokens_BTD, None if scales_BL2 is None else scales_BL2[:, number], rotation)
        return tokens_BTD
