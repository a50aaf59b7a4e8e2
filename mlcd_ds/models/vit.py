"""CLIP's and MLCD's vision transformer, parameter for parameter Hugging Face's `CLIPVisionModel` (learned positions)
and `MLCDVisionModel` (rotary positions), and the loss's projection.

Shapes: B images, C colour channels (3), N patches, T tokens (class token, registers, patches), D width, E embedding.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mlcd_ds.artefacts.typed import Frozen
from mlcd_ds.models.layers import Activation, Embeddings, Encoder, Linear, fill_nan, normal_init
from mlcd_ds.models.noise import TrainingNoise, num_kept
from mlcd_ds.models.rope import AxialRotary
from mlcd_ds.models.tower import Tower


class ViTConfig(Frozen):
    """Shape of a `ViT`. ViT-B/32 at 224: width 768, depth 12, heads 12, mlp_width 3072, 87,456,000 parameters
    without the projection. The bounds lie beyond the largest published models (width 6144)."""

    image_size: int = Field(ge=1, le=4096, description="height and width of the input images, pixels")
    patch_size: int = Field(ge=1, le=256, description="height and width of a patch, pixels")
    width: int = Field(ge=1, le=8192, description="channels of a token")
    depth: int = Field(ge=1, le=256, description="number of transformer blocks")
    heads: int = Field(ge=1, le=256, description="attention heads a block")
    mlp_width: int = Field(ge=1, le=32768, description="hidden channels of a block's MLP")
    embed_dim: int = Field(ge=1, le=16384, description="channels of the projected embedding that the loss sees")
    activation: Activation = Field("quick_gelu", description="the MLP's activation; OpenAI's CLIP has quick_gelu")
    positions: Literal["learned", "rope2d"] = Field(
        "learned", description="learned: added to the tokens (CLIP, MLCD up to L); rope2d: rotary (MLCD bigG)"
    )
    num_registers: int = Field(
        0, ge=0, le=64, description="learned tokens beside the class token (arXiv 2309.16588); exports know none"
    )
    norm_eps: float = Field(1e-5, gt=0.0, le=1e-2, description="epsilon of every layer norm")

    @model_validator(mode="after")
    def _check_divisions(self) -> "ViTConfig":
        if self.image_size % self.patch_size:
            nearest = max(1, round(self.image_size / self.patch_size)) * self.patch_size
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}: "
                f"set image_size to {nearest}, or a patch_size that divides {self.image_size}"
            )
        if self.num_patches > 2**16:
            raise ValueError(
                f"image_size {self.image_size} and patch_size {self.patch_size} make {self.num_patches} patches, more "
                "than 65,536: raise patch_size"
            )
        if self.width % self.heads:
            raise ValueError(
                f"width {self.width} is not a multiple of heads {self.heads}: "
                f"set heads to a divisor of {self.width}, or width to {(self.width // self.heads + 1) * self.heads}"
            )
        if self.positions == "rope2d" and self.head_dim % 4:
            raise ValueError(
                f"positions rope2d needs heads of a multiple of 4 channels; width {self.width} over {self.heads} heads "
                f"is {self.head_dim}: change heads"
            )
        return self

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_other_tokens(self) -> int:
        """Tokens that are not patches: the class token and the registers."""
        return 1 + self.num_registers

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads


class ViT(Tower):
    """Vision transformer with a linear projection to the embedding that the loss sees."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        is_rotary = config.positions == "rope2d"
        self.embeddings = Embeddings(
            config.patch_size,
            config.num_patches,
            config.width,
            num_registers=config.num_registers,
            has_positions=not is_rotary,
        )
        self.rotary = AxialRotary(config.head_dim, config.num_registers) if is_rotary else None
        self.pre_layrnorm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.encoder = Encoder(
            config.depth, config.width, config.heads, config.mlp_width, config.activation, config.norm_eps
        )
        self.post_layernorm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.projection = Linear(config.width, config.embed_dim, bias=False)
        fill_nan(self)

    def _init_parts(self, generator: torch.Generator) -> None:
        self.embeddings.init_weights(generator)
        if self.rotary is not None:
            normal_init(self.rotary.class_pos_emb, 1.0, generator)  # as in MLCD: not published otherwise
        self.pre_layrnorm.reset_parameters()
        self.encoder.init_weights(generator)
        self.post_layernorm.reset_parameters()
        self.projection.init_weights(self.config.width**-0.5, generator)

    def forward_tokens(self, images_BCHW: Tensor, noise: TrainingNoise | None = None) -> Tensor:
        """Return the tokens after the last block, before `post_layernorm`: [B, T, D], the class token first.

        With `noise`, whatever the module's mode, branches and patches are dropped as it says; T is then smaller. Images
        may have another size than the model's: learned positions are resized, rotary ones continue.
        Raises ValueError where the images are not squares of whole patches.
        """
        height, patch = images_BCHW.shape[-1], self.config.patch_size
        if images_BCHW.shape[1:] != (3, height, height) or height % patch:
            raise ValueError(
                f"images of shape {tuple(images_BCHW.shape)}; the model takes [B, 3, S, S], S a multiple of {patch}"
            )
        grid = height // patch
        kept_BK = noise.kept_patches(grid * grid, self.config.num_other_tokens) if noise else None
        scales_BL2 = noise.branch_scales(self.config.depth) if noise else None
        rotation = None if self.rotary is None else self.rotary(grid, kept_BK)
        return self.encoder(self.pre_layrnorm(self.embeddings(images_BCHW, kept_BK)), scales_BL2, rotation)

    def forward_features(self, images_BCHW: Tensor, noise: TrainingNoise | None = None) -> Tensor:
        """Return the features for transfer, [B, D]: `post_layernorm` of the class token, before the projection."""
        return self.post_layernorm(self.forward_tokens(images_BCHW, noise)[:, 0])

    def forward(self, images_BCHW: Tensor, noise: TrainingNoise | None = None, *, is_projected: bool = True) -> Tensor:
        """Return the embeddings for the loss, [B, E]: projected, not normalised; or else `forward_features`, [B, D].

        Of a model within a DeepSpeed engine this is the only method that may be called: through the engine.
        """
        features_BD = self.forward_features(images_BCHW, noise)
        return self.projection(features_BD) if is_projected else features_BD


def flops_per_image(config: ViTConfig, image_size: int | None = None, token_drop: float = 0.0) -> int:
    """Floating-point operations of one image's forward pass, a multiply-add counting 2.

    Matmuls only: norms, softmax, activations and biases are left out. A backward pass costs about twice as much.
    """
    width, num_patches = config.width, ((image_size or config.image_size) // config.patch_size) ** 2
    tokens = num_kept(num_patches, token_drop, config.num_other_tokens) + config.num_other_tokens
    patches = 2 * num_patches * 3 * config.patch_size**2 * width
    projections = 4 * 2 * tokens * width * width
    attention = 2 * 2 * tokens * tokens * width
    mlp = 2 * 2 * tokens * width * config.mlp_width
    return patches + config.depth * (projections + attention + mlp) + 2 * width * config.embed_dim
