"""The partial-FC head: a centre for each class, sharded by class, outside the DeepSpeed engine.

docs/head.md derives what is computed here, lists the collectives with their sizes and the memory.

B images on this rank, G of all ranks that share the classes, E embedding, F of its dimensions in use, L classes on
this rank, S of them sampled, P labels an image, p of them with a sample in common: all, or one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from mlcd_ds.artefacts.typed import Frozen, free_field
from mlcd_ds.heads.center_init import normal_centers, projected_centers
from mlcd_ds.heads.centers import Centers, sample_features, scatter_features, through_unit, to_unit
from mlcd_ds.heads.choose_exp_block import choose_exp_block
from mlcd_ds.heads.class_sampling import sample_around, sample_classes
from mlcd_ds.heads.class_shards import ClassRange, class_range
from mlcd_ds.heads.groups import HeadGroups
from mlcd_ds.heads.negatives import Negatives
from mlcd_ds.heads.positives import Positives
from mlcd_ds.kernels.matmul import Matmul


class HeadConfig(Frozen):
    """The head's own settings."""

    sample_rate: float = Field(0.1, gt=0, le=1, description="r: part of the classes drawn as negatives each step (0.1)")
    sampling: Literal["uniform", "partial_fc"] = Field(
        "uniform", description="uniform: r exactly; partial_fc: all of the batch's labels, filled up, for comparison"
    )
    init: Literal["normal", "centers"] = Field(
        "normal", description="first centres: random, or the k-means centres in data.clusters, projected"
    )
    init_std: float = Field(0.01, gt=0, description="deviation of the first centres' entries")
    parallel_size: int | None = free_field(
        None, ge=1, description="ranks that share the classes; null: all; fewer: every so many ranks hold a copy"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="of the products; sums, weights and moments are fp32. auto: bf16, but fp32 where the backbone's is "
        "or the GPU has no bf16",
    )
    kernel: Literal["auto", "torch", "triton"] = Field(
        "auto", description="of the logits' blocks; auto: triton in bf16 on a GPU where it is installed, else torch"
    )
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="of the centres")
    update: Literal["lazy", "dense"] = Field(
        "lazy", description="lazy: a step moves the rows that it touched; dense: all rows, as torch's optimizers do"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd")


class CenterLoss(Protocol):
    """A loss of what ranks can share, as the head takes it: `ClassLoss` in objectives/class_losses.py."""

    @property
    def scale(self) -> float: ...
    @property
    def shift(self) -> float: ...
    @property
    def num_labels(self) -> int | None: ...
    @property
    def feature_rate(self) -> float: ...
    @property
    def filtered_above(self) -> float | None: ...
    def sampled_apart(self, labels_GP: Tensor) -> list[tuple[Tensor, Tensor | None]]: ...
    def slopes(
        self, negatives_G: Tensor, cosines_GP: Tensor, is_label_GP: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]: ...


@dataclass(frozen=True)
class HeadOutput:
    """Means over the global batch (no gradient), and the gradient of the loss for this rank's embeddings [B, E]."""

    loss: Tensor
    parts: dict[str, Tensor]
    emb_grad_BE: Tensor


@dataclass(frozen=True)
class Term:
    """Labels with a sample in common, and what pass 1 found: the loss's parts, as means over the global batch, and its
    slopes by the negatives' sum and by the labels' cosines."""

    positives: Positives
    negatives: Negatives
    parts: dict[str, Tensor]
    factors_G: Tensor
    slopes_Gp: Tensor


class PartialFCHead(nn.Module):
    """Class centres of this rank, and the loss over the classes of all ranks.

    The loss is the mean over the global batch; the centres' gradient is that of this mean and needs no averaging. It is
    kept dense, `grad_LE`, and `touched_L` is 1 for the rows that a step has touched.
    """

    weight_LE: nn.Parameter
    grad_LE: Tensor
    touched_L: Tensor

    def __init__(
        self,
        num_classes: int,
        dim: int,
        config: HeadConfig,
        objective: CenterLoss,
        groups: HeadGroups,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """`config.precision` "auto" means fp32 here; the caller, who knows the backbone's precision, decides before."""
        super().__init__()
        self.config, self.objective, self.groups, self.seed = config, objective, groups, seed
        self.classes = class_range(num_classes, groups.classes.size, groups.classes.rank)
        self.allow_host_sync = torch.device(device).type == "cpu"
        self.matmul = Matmul(config.precision == "bf16", torch.device(device).type)
        self.exp_block = choose_exp_block(config.kernel, self.matmul, torch.device(device), objective.filtered_above)
        shape = len(self.classes), dim
        self.weight_LE = nn.Parameter(torch.full(shape, float("nan"), device=device), requires_grad=False)
        self.register_buffer("grad_LE", torch.zeros(shape, device=device), persistent=False)
        self.register_buffer("touched_L", torch.zeros(shape[0], dtype=torch.uint8, device=device), persistent=False)
        self._step = 0
        self._features_F: Tensor | None = None
        self.samples: dict[int, Tensor] = {}  # of a step: rows int64 [S], by the place of the labels that they are for
        self._side_stream = torch.cuda.Stream(self.weight_LE.device) if self.weight_LE.is_cuda else None
        self._in_flight: list[Any] = []  # what the side stream still reads

    def init_weights(self, centers_LE: Tensor | None = None) -> None:
        """Set the centres: from N(0, init_std), or from this rank's k-means centres where they are given."""
        dim, std = self.weight_LE.shape[1], self.config.init_std
        if centers_LE is None:
            rows_LE = normal_centers(self.classes, dim, std, self.seed)
        else:
            rows_LE = projected_centers(centers_LE, self.classes.num_classes, dim, std, self.groups.classes)
        with torch.no_grad():
            self.weight_LE.copy_(rows_LE)

    def resample(self, step: int) -> None:
        """Draw the negatives and the dimensions of an optimizer step, which all its micro-batches share. (Samples that
        only some labels have are drawn when the first micro-batch asks for them.)"""
        dim, device = self.weight_LE.shape[1], self.weight_LE.device
        self._step = step
        self._features_F = sample_features(dim, self.objective.feature_rate, self.seed, step, device)
        self.samples.clear()
        if self.config.sampling == "uniform":
            self.samples[0] = sample_classes(*self._drawn_by(0))

    @torch.no_grad()
    def forward(self, emb_BE: Tensor, labels_BP: Tensor, weight: float = 1.0) -> HeadOutput:
        """Loss and gradients of a micro-batch; adds `weight` times the centres' gradient to `grad_LE`.

        `emb_BE` unit length, fp32; `labels_BP` int64 global classes, nearest first, -1 for none. B is the same on every
        rank. Collectives: all-gathers of embeddings and labels over `data`; all-reduce of [1 + P, G] over `classes`, or
        P of [2, G] with separate samples; reduce-scatter of [G, E] over `data`; with a tensor-parallel backbone an
        all-reduce of [B, E]; with replicas one of the loss's parts.
        """
        emb_BF, lengths_B1 = self._used_dimensions(emb_BE)
        labels_BP = labels_BP[:, : self.objective.num_labels]
        with self.matmul.active():
            emb_GF = self.groups.data.all_gather(self.matmul.cast(emb_BF))
            labels_GP = without_repeats(self.groups.data.all_gather(labels_BP))
            centers = Centers(self.weight_LE.detach(), self.grad_LE, self._features_F)
            num_images = len(emb_GF) * self.groups.num_replicas
            terms: list[Term] = []
            emb_grad_GF: Tensor | None = None
            for place, (labels_Gp, shares_G) in enumerate(self.objective.sampled_apart(labels_GP)):
                term, grad_GF = self._term(place, emb_GF, labels_Gp, shares_G, centers, num_images)
                emb_grad_GF = grad_GF if emb_grad_GF is None else emb_grad_GF.add_(grad_GF)
                terms.append(term)
            assert emb_grad_GF is not None
            emb_grad_BF = self.groups.data.reduce_scatter_sum(emb_grad_GF)
            with self._off_the_critical_path(emb_GF, terms):
                for term in terms:
                    self._add_row_gradients(term, emb_GF, centers, weight)
        if self.groups.tensor:
            self.groups.tensor.all_reduce_sum(emb_grad_BF)
        means = torch.stack([torch.stack(list(term.parts.values())) for term in terms]).sum(dim=0)
        if self.groups.replicas:
            self.groups.replicas.all_reduce_sum(means)
        emb_grad_BE = self._all_dimensions(emb_grad_BF, emb_BF, lengths_B1, emb_BE.shape[1])
        return HeadOutput(means.sum(), dict(zip(terms[0].parts, means, strict=True)), emb_grad_BE)

    def _term(
        self,
        place: int,
        emb_GF: Tensor,
        labels_Gp: Tensor,
        shares_G: Tensor | None,
        centers: Centers,
        num_images: int,
    ) -> tuple[Term, Tensor]:
        """Pass 1 for labels with a sample in common: a term of the loss, and its gradient by the embeddings [G, F].

        `shares_G`: the term's part in an image's loss, None for all of it.
        """
        positives = Positives.find(labels_Gp, self.classes, is_compact=self.allow_host_sync)
        negatives = self._negatives(place, positives, centers, len(emb_GF))
        sums_G, slopes_GF = negatives.sums(emb_GF)
        shared = torch.cat([sums_G[None], positives.cosines(emb_GF, centers).T])
        sums_G, *cosines_pG = self.groups.classes.all_reduce_sum(shared)
        parts_G, slope_G, slopes_Gp = self.objective.slopes(
            sums_G.log() + self.objective.shift, torch.stack(cosines_pG, dim=1), labels_Gp >= 0
        )
        if shares_G is not None:
            parts_G = {name: part_G * shares_G for name, part_G in parts_G.items()}
            slope_G, slopes_Gp = slope_G * shares_G, slopes_Gp * shares_G[:, None]
        # Where an image has no negative its slope is 0; the quotient would not be a number.
        factors_G = torch.where(sums_G > 0, slope_G / sums_G, 0.0) / num_images
        slopes_Gp /= num_images
        emb_grad_GF = slopes_GF.mul_(factors_G[:, None])
        positives.add_emb_gradients(centers, slopes_Gp, emb_grad_GF)
        means = {name: part_G.sum() / num_images for name, part_G in parts_G.items()}
        return Term(positives, negatives, means, factors_G, slopes_Gp), emb_grad_GF

    def _add_row_gradients(self, term: Term, emb_GF: Tensor, centers: Centers, weight: float) -> None:
        """Pass 2: `weight` times a term's gradient of the rows, and which rows it touched."""
        positives, rows_S = term.positives, term.negatives.rows_S
        term.negatives.add_row_gradients(emb_GF, term.factors_G * weight)
        positives.add_row_gradients(emb_GF, centers, term.slopes_Gp * weight)
        self.touched_L.index_fill_(0, rows_S, 1)  # setting by index would copy the 1 from the host
        self.touched_L.scatter_reduce_(0, positives.rows_K, positives.is_here_K.to(torch.uint8), "amax")

    def finish_gradient(self) -> None:
        """Wait for `grad_LE` and `touched_L`, and sum them over replicas. Collectives: all-reduces of both there."""
        if self._side_stream:
            torch.cuda.current_stream(self.weight_LE.device).wait_stream(self._side_stream)
            self._in_flight.clear()
        if self.groups.replicas:
            self.groups.replicas.all_reduce_sum(self.grad_LE)
            self.groups.replicas.all_reduce_max(self.touched_L)

    def _negatives(self, place: int, positives: Positives, centers: Centers, num_images: int) -> Negatives:
        """The place's sample of this step; around the labels of the micro-batch, it is the micro-batch's."""
        if self.config.sampling == "partial_fc":
            rows_K = positives.rows_K[positives.is_here_K]
            self.samples[place] = sample_around(rows_K, *self._drawn_by(place))
        elif place not in self.samples:
            self.samples[place] = sample_classes(*self._drawn_by(place))
        rows_S = self.samples[place]
        slots_Gp = positives.slots(rows_S, len(self.classes), num_images)
        scale, shift = self.objective.scale, self.objective.shift
        return Negatives(centers, rows_S, slots_Gp, scale, shift, self.exp_block, self.matmul)

    def _drawn_by(self, place: int) -> tuple[ClassRange, float, int, int, torch.device, int]:
        """What decides a sample."""
        return self.classes, self.config.sample_rate, self.seed, self._step, self.weight_LE.device, place

    def _used_dimensions(self, emb_BE: Tensor) -> tuple[Tensor, Tensor | None]:
        """The dimensions in use, at unit length again, and their length before; None where all are in use."""
        return (emb_BE, None) if self._features_F is None else to_unit(emb_BE[:, self._features_F])

    def _all_dimensions(self, grad_BF: Tensor, emb_BF: Tensor, lengths_B1: Tensor | None, dim: int) -> Tensor:
        """The gradient of the whole embedding, from that of `_used_dimensions`."""
        if lengths_B1 is None:
            return grad_BF
        return scatter_features(through_unit(grad_BF, emb_BF, lengths_B1), self._features_F, dim)

    @contextmanager
    def _off_the_critical_path(self, *inputs: Any) -> Iterator[None]:
        """On a GPU: a stream of its own beside the backbone's backward, until `finish_gradient`."""
        if not self._side_stream:
            yield
            return
        self._in_flight.append(inputs)
        self._side_stream.wait_stream(torch.cuda.current_stream(self.weight_LE.device))
        with torch.cuda.stream(self._side_stream):
            yield


def without_repeats(labels_GP: Tensor) -> Tensor:
    """Labels of an image are a set: a second mention becomes -1."""
    same_GPP = labels_GP[:, :, None] == labels_GP[:, None, :]
    return labels_GP.masked_fill(same_GPP.tril(diagonal=-1).any(dim=2), -1)
