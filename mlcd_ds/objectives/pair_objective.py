"""What objectives over pairs of images and texts share: settings, a learned scale in the engine, what they need."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from mlcd_ds.data.fields import TrainingData
from mlcd_ds.distributed.groups import ParallelGroups
from mlcd_ds.objectives.base import Need, PlannedRun
from mlcd_ds.objectives.pairs import BLOCKS, Pairs
from mlcd_ds.objectives.products import PrecisionConfig, check_products, make_matmul, product_width
from mlcd_ds.objectives.two_towers import TwoTowers
from mlcd_ds.recipes.sections import ObjectiveConfig, Sections

FP32 = 4


class PairConfig(PrecisionConfig, ObjectiveConfig):
    """What losses over pairs of images and texts have in common."""

    max_scale: float = Field(100.0, gt=1, le=1000, description="largest factor on cosines; the smallest is 1")


class PairObjective(TwoTowers):
    """An objective over all pairs of a global batch, with a learned scale in the engine."""

    needs_whole_batch = True
    output_names: ClassVar[tuple[str, ...]] = ("scale", "bias")
    num_products: ClassVar[int]
    """Products [B, G, E] of a step on a rank."""

    def __init__(self, recipe: Sections, data: TrainingData, groups: ParallelGroups, device: torch.device) -> None:
        assert isinstance(recipe.objective, PairConfig)
        self.group, self.matmul = groups.data, make_matmul(recipe.objective, recipe, device)
        self._wanted = [name for name in self.towers if not recipe.is_frozen(name)]
        self._measures: dict[str, Tensor] = {}

    @classmethod
    def check_device(cls, recipe: Sections, device: torch.device) -> None:
        assert isinstance(recipe.objective, PairConfig)
        check_products(recipe.objective, device)

    @classmethod
    def need(cls, recipe: Sections, run: PlannedRun) -> Need:
        assert isinstance(recipe.objective, PairConfig)
        batch, dim, ranks = recipe.train.global_batch, recipe.model.embed_dim, run.num_ranks // run.tensor_parallel
        width = product_width(recipe.objective, recipe)
        block = min(BLOCKS["cuda"][0], batch // ranks) * min(BLOCKS["cuda"][1], batch)
        memory = {
            "texts of all ranks": batch * dim * width,
            "gradients": (batch + batch // ranks) * dim * FP32,
            "block of logits": block * (3 * FP32 + width),
        }
        # Of the texts: themselves and their gradient.
        sent = run.micro_batch * ranks * dim * (width + FP32) * (1 - 1 / ranks)
        flops = cls.num_products * 2 * batch // ranks * batch * dim
        return Need({"loss: during a step": sum(memory.values())}, sent, "the loss", flops)

    def pairs(self, outputs: Mapping[str, Tensor], scale: Tensor) -> Pairs:
        """Of the towers' outputs; notes how far apart the modalities are. Collectives: those of `Pairs`, and `gap`."""
        image_BE, text_BE = outputs["image"].detach(), outputs["text"].detach()
        pairs = Pairs(image_BE, text_BE, scale, self.group, self.matmul, self._wanted)
        self._measures = {"logit_scale": scale, "embeddings/modality_gap": pairs.gap()}
        return pairs

    def step(self, lr: float) -> dict[str, Tensor]:
        return self._measures


class _ClampInward(torch.autograd.Function):
    """Forward: clamp. Backward: a gradient passes, except where its descent would lead further out."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, least: float, most: float) -> Tensor:
        ctx.save_for_backward(value)
        ctx.bounds = least, most
        return value.clamp(least, most)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (value,), (least, most) = ctx.saved_tensors, ctx.bounds
        leads_out = ((value <= least) & (upstream > 0)) | ((value >= most) & (upstream < 0))
        return upstream.masked_fill(leads_out, 0.0), None, None


class Scale(nn.Module):
    """The learned factor on cosines, exp(theta) within bounds, and perhaps a summand: outputs `scale` and `bias`.

    At a bound theta stays, and comes back when its gradient says so: as if it were clamped after each step.
    """

    def __init__(self, first: float, bounds: tuple[float, float], bias: float | None = None) -> None:
        super().__init__()
        self.log_bounds = math.log(bounds[0]), math.log(bounds[1])
        # Of one dimension: DeepSpeed broadcasts parameters as bytes, and a number has no such view.
        self.log_scale = nn.Parameter(torch.tensor([math.log(first)]))
        self.bias = None if bias is None else nn.Parameter(torch.tensor([bias]))

    @property
    def log_factor(self) -> Tensor:
        """The factor's logarithm, within its bounds: fp32, a number."""
        return self.log_scale.detach()[0].float().clamp(*self.log_bounds)

    def forward(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is added to the towers' outputs."""
        added = {"scale": _ClampInward.apply(self.log_scale[0].float(), *self.log_bounds).exp()}
        return added if self.bias is None else {**added, "bias": self.bias[0].float()}


def first_scale(module: nn.Module) -> Scale | None:
    """The factor on cosines of images and texts among what the engine trains for an objective; None without one."""
    return next((part for part in module.modules() if isinstance(part, Scale)), None)
