"""Nearest centres, behind one small interface. The only file that imports faiss.

B rows of a block, C centres, E width, k centres wanted. A *score* is larger for a nearer centre: `x . c` for cosine,
`x . c - |c|^2 / 2` for euclidean, so that `|x - c|^2 = |x|^2 - 2 score`.
"""

from __future__ import annotations

import importlib.util
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from mlcd_ds.errors import UserError

Metric = Literal["cosine", "euclidean"]
AssignerName = Literal["auto", "faiss", "torch", "triton"]
Precision = Literal["auto", "fp32", "bf16"]
# Below so many multiplications in a pass, fp32 takes seconds and bf16's rounding is not worth them.
MANY_MULTIPLICATIONS = 10**12


class Assigner(Protocol):
    """Finds, for rows [B, E], the `k` centres of largest score."""

    def set_centers(self, centers_CE: Tensor) -> None:
        """Take fp32 centres [C, E]."""

    def search(self, rows_BE: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Scores fp32 [B, k], largest first, and centres int64 [B, k]."""


class FaissAssigner:
    """Exhaustive search by faiss on the CPU, in fp32."""

    def __init__(self, metric: Metric = "cosine") -> None:
        self._faiss = _import_faiss()
        self._metric = metric

    def set_centers(self, centers_CE: Tensor) -> None:
        self._centers_CE = np.ascontiguousarray(centers_CE.cpu().float().numpy())

    def search(self, rows_BE: Tensor, k: int) -> tuple[Tensor, Tensor]:
        faiss, rows = self._faiss, np.ascontiguousarray(rows_BE.float().numpy())
        euclidean = self._metric == "euclidean"
        kind = faiss.METRIC_L2 if euclidean else faiss.METRIC_INNER_PRODUCT
        values, nearest = faiss.knn(rows, self._centers_CE, k, metric=kind)
        values_Bk = torch.from_numpy(values)
        if euclidean:
            values_Bk = (rows_BE.float().square().sum(dim=1, keepdim=True) - values_Bk) / 2
        return values_Bk, torch.from_numpy(nearest)


class FaissGpuAssigner:
    """Exhaustive search by faiss on this process's GPU; rows and centres in fp32, or in bf16 with fp32 sums."""

    def __init__(self, metric: Metric = "cosine", is_bf16: bool = True) -> None:
        self._faiss = _import_faiss()
        if not hasattr(self._faiss, "StandardGpuResources"):
            raise UserError('--assigner faiss on a GPU needs its GPU build: pip install "mlcd_ds[gpu]".')
        import faiss.contrib.torch_utils  # noqa: F401  (its functions then take tensors)

        self._resources = self._faiss.StandardGpuResources()
        self._metric, self._dtype = metric, torch.bfloat16 if is_bf16 else torch.float32

    def set_centers(self, centers_CE: Tensor) -> None:
        self._centers_CE = centers_CE.cuda().to(self._dtype).contiguous()

    def search(self, rows_BE: Tensor, k: int) -> tuple[Tensor, Tensor]:
        faiss, rows = self._faiss, rows_BE.cuda().to(self._dtype).contiguous()
        euclidean = self._metric == "euclidean"
        kind = faiss.METRIC_L2 if euclidean else faiss.METRIC_INNER_PRODUCT
        values_Bk, nearest_Bk = faiss.knn_gpu(self._resources, rows, self._centers_CE, k, metric=kind)
        if euclidean:
            values_Bk = (rows.float().square().sum(dim=1, keepdim=True) - values_Bk) / 2
        return values_Bk.float(), nearest_Bk


def _import_faiss():
    try:
        import faiss
    except ImportError:
        raise UserError('faiss is not installed: pip install "mlcd_ds[cpu]" (or [gpu]).') from None
    return faiss


def resolve_precision(precision: Precision, device: torch.device, num_multiplications: float) -> bool:
    """Whether products take bf16 inputs. `auto`: on a GPU, or a CPU with bf16 tiles, where a pass is long."""
    if precision != "auto":
        return precision == "bf16"
    has_fast_bf16 = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
    return has_fast_bf16 and num_multiplications >= MANY_MULTIPLICATIONS


def choose_assigner(name: AssignerName, metric: Metric, device: torch.device, is_bf16: bool) -> Assigner:
    """The assigner by `--assigner`. UserError when one is asked for that cannot run here.

    `auto` is torch on a CPU. On a GPU it is triton for bf16, else torch.
    """
    from mlcd_ds.clustering.blockwise import BlockwiseAssigner

    has_triton = importlib.util.find_spec("triton") is not None
    if name == "faiss":
        if device.type == "cuda":
            return FaissGpuAssigner(metric, is_bf16)
        if is_bf16:
            raise UserError("--assigner faiss multiplies fp32 on a CPU: pass --precision fp32, or --assigner torch.")
        return FaissAssigner(metric)
    if name == "torch" or (name == "auto" and not (has_triton and device.type == "cuda" and is_bf16)):
        return BlockwiseAssigner(metric, is_bf16, device)
    if not has_triton:
        raise UserError("--assigner triton: triton is not installed: pip install triton, or pass --assigner torch.")
    from mlcd_ds.clustering.triton_nearest import TritonAssigner

    return TritonAssigner(metric, is_bf16, device)
