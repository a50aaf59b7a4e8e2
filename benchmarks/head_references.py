"""What benchmarks/head.py compares the head with: the plain dense form, and Partial FC for each label.

All are written for this comparison from their descriptions. The dense form holds what autograd holds; Partial FC turns
its logits into gradients in place, as its authors' code does. B images of a rank,
G of all ranks, E embedding, L classes of a rank, S of them sampled, P labels an image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcd_ds.distributed.collectives import Group
from mlcd_ds.heads.class_sampling import num_sampled, sample_classes
from mlcd_ds.heads.class_shards import class_range

SCALE, MARGIN = 64.0, 0.3


class _GatherWithGradient(torch.autograd.Function):
    """All-gather whose backward is a reduce-scatter."""

    @staticmethod
    def forward(ctx, emb_BE: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.all_gather(emb_BE)

    @staticmethod
    def backward(ctx, grad_GE: Tensor) -> tuple[Tensor, None]:
        return ctx.group.reduce_scatter_sum(grad_GE), None


class _SumOverRanks(torch.autograd.Function):
    """All-reduce; every rank goes on with the same value, and its backward is the identity."""

    @staticmethod
    def forward(ctx, values: Tensor, group: Group) -> Tensor:
        return group.all_reduce_sum(values.clone())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Reference(nn.Module):
    """Centres of this rank under torch's dense AdamW, clipped by the norm over all shards."""

    def __init__(self, num_classes: int, dim: int, rate: float, group: Group, device: torch.device) -> None:
        super().__init__()
        self.classes, self.rate, self.group = class_range(num_classes, group.size, group.rank), rate, group
        self.weight_LE = nn.Parameter(torch.randn(len(self.classes), dim, device=device) * 0.01)
        self.optimizer = torch.optim.AdamW([self.weight_LE], lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
        self.step_number = 0

    def step(self, emb_BE: Tensor, labels_BP: Tensor) -> Tensor:
        """Forward, backward and optimizer; returns the gradient of the embeddings."""
        emb_BE = emb_BE.detach().requires_grad_()
        self.loss(emb_BE, labels_BP).backward()
        self.finish_step()
        return emb_BE.grad

    def finish_step(self) -> None:
        """Clip, step, clear."""
        norm = self.group.all_reduce_sum(self.weight_LE.grad.square().sum()).sqrt()
        self.weight_LE.grad.mul_((5.0 / (norm + 1e-6)).clamp_max(1.0))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step_number += 1

    def loss(self, emb_BE: Tensor, labels_BP: Tensor) -> Tensor:
        raise NotImplementedError


class DenseMLCD(Reference):
    """The MLCD loss over the same sample as the head's, with all logits in memory."""

    def loss(self, emb_BE: Tensor, labels_BP: Tensor) -> Tensor:
        emb_GE = _GatherWithGradient.apply(emb_BE, self.group)
        local_GP = self.group.all_gather(labels_BP) - self.classes.begin
        sampled_S = sample_classes(self.classes, self.rate, 0, self.step_number, emb_BE.device)
        images_K, places_K = ((local_GP >= 0) & (local_GP < len(self.classes))).nonzero(as_tuple=True)
        rows_K = local_GP[images_K, places_K]
        slots_L = torch.full((len(self.classes),), len(sampled_S), device=emb_BE.device)
        slots_L[sampled_S] = torch.arange(len(sampled_S), device=emb_BE.device)
        own_GS = torch.zeros(len(emb_GE), len(sampled_S) + 1, dtype=torch.bool, device=emb_BE.device)
        own_GS[images_K, slots_L[rows_K]] = True
        logits_GS = SCALE * emb_GE @ F.normalize(self.weight_LE[sampled_S], dim=1).T
        negative_G = torch.exp(logits_GS.masked_fill(own_GS[:, :-1], -torch.inf) - SCALE / 2).sum(dim=1)
        cosines_K = (emb_GE[images_K] * F.normalize(self.weight_LE[rows_K], dim=1)).sum(dim=1)
        exp_K = torch.exp(SCALE * (MARGIN - cosines_K) - SCALE * (1 + MARGIN) / 2)
        positive_G = torch.zeros(len(emb_GE), device=emb_BE.device).index_add(0, images_K, exp_K)
        sums_2G = _SumOverRanks.apply(torch.stack([negative_G, positive_G]), self.group)
        shifts_2 = torch.tensor([SCALE / 2, SCALE * (1 + MARGIN) / 2], device=emb_BE.device)
        return (torch.log(sums_2G + torch.exp(-shifts_2)[:, None]) + shifts_2[:, None]).sum(dim=0).mean()


class _SoftmaxOverRanks(torch.autograd.Function):
    """Cross-entropy of logits [G, S] whose classes are spread over ranks; logits become probabilities, then gradients,
    in place, as Partial FC's authors do it. `target_G`: the label's column, -1 where it is another rank's."""

    @staticmethod
    def forward(ctx, logits_GS: Tensor, target_G: Tensor, group: Group) -> Tensor:
        logits_GS.sub_(group.all_reduce_max(logits_GS.amax(dim=1))[:, None]).exp_()
        logits_GS.div_(group.all_reduce_sum(logits_GS.sum(dim=1))[:, None])
        here_K = (target_G >= 0).nonzero()[:, 0]
        probability_G = logits_GS.new_zeros(len(target_G))
        probability_G[here_K] = logits_GS[here_K, target_G[here_K]]
        ctx.save_for_backward(here_K, logits_GS, target_G)
        return -group.all_reduce_sum(probability_G).clamp_min(1e-30).log().mean()

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        here_K, logits_GS, target_G = ctx.saved_tensors
        logits_GS[here_K, target_G[here_K]] -= 1
        return logits_GS.mul_(upstream / len(target_G)), None, None


class PartialFCFrugal(Reference):
    """Partial FC (arXiv 2203.15565) run for each of P labels in turn, as users of a single-label head do: a call and a
    backward each, gradients added up, one step of the optimizer.

    For each label a sample of its own that holds the batch's labels, and a softmax over it.
    """

    def step(self, emb_BE: Tensor, labels_BP: Tensor) -> Tensor:
        """Forward, backward and optimizer; returns the gradient of the embeddings."""
        emb_BE = emb_BE.detach().requires_grad_()
        for labels_B in labels_BP.unbind(dim=1):
            (self.softmax(emb_BE, labels_B) / labels_BP.shape[1]).backward()
        self.finish_step()
        return emb_BE.grad

    def softmax(self, emb_BE: Tensor, labels_B: Tensor) -> Tensor:
        """The loss of one label."""
        emb_GE = F.normalize(_GatherWithGradient.apply(emb_BE, self.group), dim=1)
        local_G = self.group.all_gather(labels_B) - self.classes.begin
        is_here_G = (local_G >= 0) & (local_G < len(self.classes))
        positives = local_G[is_here_G].unique()
        order_L = torch.rand(len(self.classes), device=emb_GE.device)
        order_L[positives] = 2.0
        size = max(num_sampled(self.classes, self.rate), len(positives))
        sampled_S = order_L.topk(size).indices.sort().values
        target_G = torch.searchsorted(sampled_S, local_G.where(is_here_G, 0)).where(is_here_G, -1)
        logits_GS = (emb_GE @ F.normalize(self.weight_LE[sampled_S], dim=1).T).clamp(-1, 1)
        here_K = is_here_G.nonzero()[:, 0]
        logits_GS[here_K, target_G[here_K]] -= MARGIN
        return _SoftmaxOverRanks.apply(logits_GS * SCALE, target_G, self.group)


class PartialFCSummed(PartialFCFrugal):
    """The same with one backward for the sum of the P losses, which holds P times the logits."""

    step = Reference.step

    def loss(self, emb_BE: Tensor, labels_BP: Tensor) -> Tensor:
        return torch.stack([self.softmax(emb_BE, labels_B) for labels_B in labels_BP.unbind(dim=1)]).mean()
