"""nCLIP's loss: a wide distribution of each modality is the label of the other. Logits are formed some rows at a time.

With p_i and q_i the distributions of image i and its text over K dimensions, and pbar, qbar their means over the batch
(arXiv 2210.09304):

    L = w CE - lambda_2 HE + lambda_1 EH
    CE = 1/2G sum_i [H(p_i, q_i) + H(q_i, p_i)]   each modality foretells the other
    EH = 1/2G sum_i [H(p_i) + H(q_i)]             each distribution is narrow
    HE = 1/2 [H(pbar) + H(qbar)]                  all dimensions are in use

with H(a, b) = -sum_k a_k log b_k. The slopes by the logits z_i of p_i = softmax(z_i), and likewise of q:

    2G dL/dz_ik = w (p_ik - q_ik) + p_ik { w [-log q_ik - H(p_i, q_i)]
                                          + lambda_1 [-log p_ik - H(p_i)] - lambda_2 [-log pbar_k - H(p_i, pbar)] }

A row needs of the others only pbar. So there are two passes over blocks of rows: the first gives the loss and pbar, the
second forms the logits again, and from them the slopes and both their products. A block is at most BLOCK numbers.

B images and texts on this rank, G of all ranks, W width of the heads, K dimensions; b: rows of one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mlcd_ds.distributed.collectives import Group
from mlcd_ds.kernels.matmul import Matmul

BLOCK = {"cpu": 2**22, "cuda": 2**27}  # most numbers in a block of logits
LEAST_ROWS = 64  # of a block, which reads and writes all of the weights' gradient
LEAST = 1e-30  # stands for a mean of 0, whose logarithm must stay finite


@dataclass(frozen=True)
class TermWeights:
    """Factors on the terms: w, lambda_1 and lambda_2."""

    cross_entropy: float
    entropy: float
    mean_entropy: float


@dataclass(frozen=True)
class PseudoLabels:
    """Means over the batch of all ranks: the terms CE, EH and HE [3], and pbar and qbar [2, K]. And this rank's share
    of the gradients, of image and text: by what the last layers are given [B, W], complete, and by their weights
    [K, W]."""

    terms: Tensor
    means_2K: Tensor
    hidden_gradients: tuple[Tensor, Tensor]
    weight_gradients: tuple[Tensor, Tensor]


class Logits:
    """Of one modality: rows [B, W] times the last layer's weights [K, W], over a temperature."""

    def __init__(self, hidden_BW: Tensor, weights_KW: Tensor, temperature: float, matmul: Matmul) -> None:
        self._matmul, self._factor = matmul, 1 / temperature
        self._hidden_BW, self._weights_KW = matmul.cast(hidden_BW), matmul.cast(weights_KW)
        wide = torch.promote_types(hidden_BW.dtype, torch.float32)
        self.hidden_grad_BW = torch.zeros_like(hidden_BW, dtype=wide)
        self.weights_grad_KW = torch.zeros_like(weights_KW, dtype=wide)

    def log_probabilities(self, rows: slice) -> Tensor:
        """[b, K]."""
        logits_bK = self._matmul(self._hidden_BW[rows], self._weights_KW.T)
        return torch.log_softmax(logits_bK.mul_(self._factor), dim=1)

    def add_slopes(self, rows: slice, slopes_bK: Tensor, factor: float) -> None:
        """Take in `factor` times the loss's slopes by the logits of a block."""
        slopes_bK = self._matmul.cast(slopes_bK.mul_(factor * self._factor))
        self._matmul.add(self.hidden_grad_BW[rows], slopes_bK, self._weights_KW)
        self._matmul.add(self.weights_grad_KW, slopes_bK.T, self._hidden_BW[rows])


def pseudo_labels(
    hidden: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    temperatures: tuple[float, float],
    terms: TermWeights,
    group: Group,
    matmul: Matmul,
) -> PseudoLabels:
    """Terms and gradients of image and text: `hidden` [B, W] each, `weights` [K, W] each. Collectives: an all-reduce of
    [2 K + 2] numbers.
    """
    (num_rows, _), (num_dims, _), device = hidden[0].shape, weights[0].shape, hidden[0].device
    with matmul.active():
        both = [Logits(*each, matmul) for each in zip(hidden, weights, temperatures, strict=True)]
        like = both[0].hidden_grad_BW
        own_2B, cross_2B = like.new_zeros(2, num_rows), like.new_zeros(2, num_rows)  # H(p), H(q); H(p, q), H(q, p)
        shared = like.new_zeros(2 * num_dims + 2)
        means_2K, entropies_2 = shared[:-2].view(2, num_dims), shared[-2:]
        for rows in _blocks(num_rows, num_dims, device):
            logs = [logits.log_probabilities(rows) for logits in both]
            for number, (log_bK, other_bK) in enumerate(zip(logs, logs[::-1], strict=True)):
                probabilities_bK = log_bK.exp()
                means_2K[number] += probabilities_bK.sum(dim=0)
                own_2B[number, rows] = _entropies(probabilities_bK, log_bK)
                cross_2B[number, rows] = _entropies(probabilities_bK, other_bK)
        entropies_2 += torch.stack([cross_2B.sum(), own_2B.sum()])
        group.all_reduce_sum(shared)
        num_images = num_rows * group.size
        means_2K /= num_images
        logs_2K = means_2K.clamp_min(LEAST).log()
        for rows in _blocks(num_rows, num_dims, device):
            logs = [logits.log_probabilities(rows) for logits in both]
            probabilities = [log_bK.exp() for log_bK in logs]
            for number, other in ((0, 1), (1, 0)):
                p_bK, log_p_bK, mean_log_K = probabilities[number], logs[number], logs_2K[number]
                constants_b = terms.cross_entropy * (1 - cross_2B[number, rows])
                constants_b += terms.mean_entropy * _entropies(p_bK, mean_log_K) - terms.entropy * own_2B[number, rows]
                slopes_bK = torch.add(constants_b[:, None], logs[other], alpha=-terms.cross_entropy)
                slopes_bK.add_(log_p_bK, alpha=-terms.entropy).add_(mean_log_K, alpha=terms.mean_entropy).mul_(p_bK)
                slopes_bK.sub_(probabilities[other], alpha=terms.cross_entropy)
                both[number].add_slopes(rows, slopes_bK, 0.5 / num_images)
    mean_entropy = -(means_2K * logs_2K).sum() / 2
    values = torch.cat([entropies_2 / (2 * num_images), mean_entropy[None]])
    image, text = both
    return PseudoLabels(
        values,
        means_2K,
        (image.hidden_grad_BW, text.hidden_grad_BW),
        (image.weights_grad_KW, text.weights_grad_KW),
    )


def _blocks(num_rows: int, num_dims: int, device: torch.device) -> Iterator[slice]:
    size = max(LEAST_ROWS, BLOCK[device.type] // num_dims)
    for begin in range(0, num_rows, size):
        yield slice(begin, min(begin + size, num_rows))


def _entropies(probabilities_bK: Tensor, logs_bK: Tensor) -> Tensor:
    """[b]: H(a, b) of each row, from a and log b."""
    # Not by a product of matrices: its running sum over K numbers was off by 1e-5, and a slope is a small difference.
    return -torch.linalg.vecdot(probabilities_bK, logs_bK)
