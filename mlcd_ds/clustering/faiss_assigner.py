"""Nearest centres by faiss, on the CPU and on the GPU. The only file that imports faiss.

B rows of a block, C centres, E width, k centres wanted.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlcd_ds.clustering.assigner import Metric, row_squares
from mlcd_ds.errors import UserError


def has_faiss(device: torch.device) -> bool:
    """Whether faiss is installed, for a GPU with GPU support."""
    if importlib.util.find_spec("faiss") is None:
        return False
    return device.type == "cpu" or hasattr(_import_faiss(), "StandardGpuResources")


class FaissAssigner:
    """Exhaustive search by faiss on the CPU, in fp32, with as many threads as torch has."""

    def __init__(self, metric: Metric = "cosine") -> None:
        self._faiss = _import_faiss()
        self._metric = metric

    def set_centers(self, centers_CE: Tensor) -> None:
        self._centers_CE = np.ascontiguousarray(centers_CE.cpu().float().numpy())

    def search(self, rows_BE: Tensor, k: int, squares_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert k <= len(self._centers_CE), "faiss fills up with centre -1"
        faiss, rows = self._faiss, np.ascontiguousarray(rows_BE.float().numpy())
        faiss.omp_set_num_threads(torch.get_num_threads())  # its own OpenMP would take all cores for every rank
        euclidean = self._metric == "euclidean"
        kind = faiss.METRIC_L2 if euclidean else faiss.METRIC_INNER_PRODUCT
        values, nearest = faiss.knn(rows, self._centers_CE, k, metric=kind)
        values_Bk = torch.from_numpy(values)
        if euclidean:
            if squares_B is None:
                squares_B = row_squares(rows_BE.float())
            values_Bk = (squares_B[:, None] - values_Bk) / 2
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

    def search(self, rows_BE: Tensor, k: int, squares_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        faiss, rows = self._faiss, rows_BE.cuda().to(self._dtype).contiguous()
        euclidean = self._metric == "euclidean"
        kind = faiss.METRIC_L2 if euclidean else faiss.METRIC_INNER_PRODUCT
        values_Bk, nearest_Bk = faiss.knn_gpu(self._resources, rows, self._centers_CE, k, metric=kind)
        if euclidean:
            if squares_B is None:
                squares_B = row_squares(rows.float())
            values_Bk = (squares_B[:, None] - values_Bk) / 2
        return values_Bk.float(), nearest_Bk


def _import_faiss() -> Any:
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        # The OpenBLAS in faiss-cpu mistakes newer Intel processors for one with SSE3: a quarter of their speed.
        os.environ.setdefault("OPENBLAS_CORETYPE", "SkylakeX")
    try:
        import faiss
    except ImportError:
        raise UserError('faiss is not installed: pip install "mlcd_ds[cpu]" (or [gpu]).') from None
    return faiss
