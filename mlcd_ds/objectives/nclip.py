"""nCLIP (arXiv 2210.09304): an image's distribution over many dimensions is the label of its text, and the reverse.

No code of it was published, and of its constants only the number of dimensions. All others are keys here, and say so.
The heads are ours, too: Linear, GELU, Linear, on embeddings of unit length. xCLIP is the sum of CLIP and this (sum.py).

B images and texts on this rank, E embedding, W width of the heads, K dimensions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mlcd_ds.data.fields import TrainingData
from mlcd_ds.distributed.groups import ParallelGroups
from mlcd_ds.objectives.base import APART, Given, Need, PlannedRun, engine_memory
from mlcd_ds.objectives.products import PrecisionConfig, check_products, make_matmul, product_width
from mlcd_ds.objectives.pseudo_labels import BLOCK, LEAST_ROWS, TermWeights, pseudo_labels
from mlcd_ds.objectives.two_towers import TwoTowers
from mlcd_ds.recipes.sections import ObjectiveConfig, Sections

PARTS = ("first", "bias", "last")  # a head's parameters: [W, E], [W], [K, W]
DEAD_SHARE = 0.01  # of 1 / K: dimensions whose mean is below it are counted as dead
COLLAPSED_SHARE = 0.1  # of log K: below it the mean distribution has collapsed
logger = logging.getLogger("mlcd_ds")  # only rank 0 logs (stages/runner.py)


class NclipConfig(PrecisionConfig, ObjectiveConfig):
    """The paper's number of dimensions; everything else is not published."""

    name: Literal["nclip"] = "nclip"
    num_dims: int = Field(32768, ge=2, description="K, the dimensions of the distributions (paper: 32,768)")
    head_width: int = Field(512, ge=1, description="of the heads' hidden layer (not published)")
    image_temperature: float = Field(0.1, gt=0, description="under the logits of images (not published)")
    text_temperature: float = Field(0.1, gt=0, description="under the logits of texts (not published)")
    cross_entropy_weight: float = Field(1.0, gt=0, description="of the cross-entropies between modalities")
    entropy_weight: float = Field(
        0.5, ge=0, description="lambda_1, of the distributions' own entropies, which fall (not published)"
    )
    mean_entropy_weight: float = Field(
        1.0, ge=0, description="lambda_2, of the mean distributions' entropies, which rise (not published)"
    )


class Nclip(TwoTowers):
    """Heads to K dimensions, whose weights the engine trains and the loss takes: [B, K] is never whole."""

    config_type = NclipConfig
    needs_whole_batch = True
    output_names = tuple(f"nclip_{tower}_{part}" for tower in TwoTowers.towers for part in PARTS)

    def __init__(self, recipe: Sections, data: TrainingData, groups: ParallelGroups, device: torch.device) -> None:
        self.config = nclip_config(recipe)
        self.group, self.matmul = groups.data, make_matmul(self.config, recipe, device)
        self._wanted = [name for name in self.towers if not recipe.is_frozen(name)]
        self._measures: dict[str, Tensor] = {}
        self._has_warned = False

    @classmethod
    def check_device(cls, recipe: Sections, device: torch.device) -> None:
        check_products(nclip_config(recipe), device)

    @classmethod
    def describe(cls, recipe: Sections, data: TrainingData, num_ranks: int, tensor_parallel: int) -> list[str]:
        config = nclip_config(recipe)
        return [f"heads: {recipe.model.embed_dim} -> {config.head_width} -> {config.num_dims}, for image and text"]

    @classmethod
    def need(cls, recipe: Sections, run: PlannedRun) -> Need:
        config, rows = nclip_config(recipe), run.per_rank(recipe)
        head = config.head_width * (recipe.model.embed_dim + 1 + config.num_dims)
        width = product_width(config, recipe)
        hidden = rows * config.head_width * (3 * 4 + width)
        # Of a block: logarithms and probabilities of both modalities, and the slopes.
        block = min(rows * config.num_dims, max(BLOCK["cuda"], LEAST_ROWS * config.num_dims))
        memory = {"loss: during a step": 2 * hidden + 6 * 4 * block + 2 * 2 * 4 * config.num_dims}
        flops = 2 * 4 * 2 * rows * config.num_dims * config.head_width
        sent = 2 * 4 * config.num_dims * run.micro_batch / rows  # once a step
        return Need({**engine_memory(2 * head, run), **memory}, sent, "the heads", flops)

    @classmethod
    def engine_module(cls, recipe: Sections) -> nn.Module:
        config = nclip_config(recipe)
        generator = torch.Generator().manual_seed(recipe.train.seed + APART)
        return Heads(recipe.model.embed_dim, config.head_width, config.num_dims, generator)

    @torch.no_grad()
    def __call__(self, outputs: Mapping[str, Tensor], fields: Mapping[str, Tensor], weight: float = 1.0) -> Given:
        """Collectives: those of `pseudo_labels`."""
        config, given = self.config, {name: outputs[name].detach() for name in (*self.towers, *self.output_names)}
        with torch.enable_grad():
            leaves = {name: _wide(tensor).requires_grad_() for name, tensor in given.items() if "last" not in name}
            image_BW, text_BW = (_hidden(leaves, tower) for tower in self.towers)
        last = given["nclip_image_last"], given["nclip_text_last"]
        temperatures = config.image_temperature, config.text_temperature
        weights = TermWeights(config.cross_entropy_weight, config.entropy_weight, config.mean_entropy_weight)
        found = pseudo_labels((image_BW, text_BW), last, temperatures, weights, self.group, self.matmul)
        wanted = [name for name in leaves if name not in self.towers or name in self._wanted]
        by_leaf = torch.autograd.grad((image_BW, text_BW), [leaves[name] for name in wanted], found.hidden_gradients)
        names_of_last = [f"nclip_{tower}_last" for tower in self.towers]
        gradients = dict(zip((*wanted, *names_of_last), (*by_leaf, *found.weight_gradients), strict=True))
        factors = (weights.cross_entropy, weights.entropy, -weights.mean_entropy)
        names = ("cross_entropy", "entropy", "mean_entropy")
        parts = {name: term * factor for name, term, factor in zip(names, found.terms, factors, strict=True)}
        self._measure(found.means_2K)
        return Given(torch.stack(list(parts.values())).sum(), parts, gradients)

    def _measure(self, means_2K: Tensor) -> None:
        """Note how many dimensions the batch uses."""
        entropies_2 = torch.special.entr(means_2K).sum(dim=1)
        dead_2 = (means_2K < DEAD_SHARE / means_2K.shape[1]).float().mean(dim=1)
        for number, tower in enumerate(self.towers):
            self._measures[f"nclip/mean_entropy_{tower}"] = entropies_2[number]
            self._measures[f"nclip/dead_dims_{tower}"] = dead_2[number]

    def step(self, lr: float) -> dict[str, Tensor]:
        return self._measures

    def take_counts(self) -> dict[str, int]:
        """None; a warning, once, where a mean distribution has collapsed."""
        most = math.log(self.config.num_dims)
        for tower in self.towers:
            entropy = self._measures.get(f"nclip/mean_entropy_{tower}")
            if not self._has_warned and entropy is not None and float(entropy) < COLLAPSED_SHARE * most:
                self._has_warned = True
                logger.warning(
                    "nclip: the mean distribution of the %s tower has collapsed: its entropy is %.2f of at most %.2f. "
                    "Raise nclip's mean_entropy_weight, or lower optimizer.lr.",
                    *(tower, float(entropy), most),
                )
        return {}


class Heads(nn.Module):
    """Both heads' parameters, which are its outputs: the loss multiplies with them some rows at a time."""

    def __init__(self, embed_dim: int, width: int, num_dims: int, generator: torch.Generator) -> None:
        super().__init__()
        shapes = {"first": (width, embed_dim), "bias": (width,), "last": (num_dims, width)}
        # Of embeddings of unit length come hidden values, and logits, of deviation about one.
        deviations = {"first": 1.0, "bias": 0.0, "last": width**-0.5}
        for tower in TwoTowers.towers:
            for part, shape in shapes.items():
                values = torch.randn(shape, generator=generator) * deviations[part]
                self.register_parameter(f"{tower}_{part}", nn.Parameter(values))

    def forward(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """All parameters, copied: ZeRO stage 3 frees them after this call."""
        return {f"nclip_{name}": parameter.clone() for name, parameter in self.named_parameters()}


def _hidden(leaves: Mapping[str, Tensor], tower: str) -> Tensor:
    """[B, W]: what a tower's last layer is given."""
    return F.gelu(F.linear(leaves[tower], leaves[f"nclip_{tower}_first"], leaves[f"nclip_{tower}_bias"]))


def _wide(tensor: Tensor) -> Tensor:
    """At least fp32, and a tensor of its own."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


def nclip_config(recipe: Sections) -> NclipConfig:
    """A recipe's `objective:` section, where it is of this objective."""
    assert isinstance(recipe.objective, NclipConfig)
    return recipe.objective
