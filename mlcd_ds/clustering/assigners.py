"""Nearest centres by inner product. The only file that imports faiss."""

from __future__ import annotations

import logging
from typing import Protocol

import numpy as np

from mlcd_ds.errors import UserError

logger = logging.getLogger("mlcd_ds")


class Assigner(Protocol):
    """Finds, for rows [B, E], the `k` centres of largest inner product."""

    def set_centers(self, centers_CE: np.ndarray) -> None:
        """Take fp32 centres [C, E]."""

    def search(self, rows_BE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Similarities fp32 [B, k], largest first, and centres int64 [B, k]."""


class FaissAssigner:
    """Exhaustive search by faiss: on this process's GPU, or on the CPU."""

    def __init__(self, dim: int, use_gpu: bool) -> None:
        try:
            import faiss
        except ImportError:
            raise UserError('faiss is not installed: pip install "mlcd_ds[cpu]" (or [gpu]).') from None
        self._index = faiss.IndexFlatIP(dim)
        if use_gpu and not hasattr(faiss, "StandardGpuResources"):
            logger.info("faiss is the CPU build, though there is a GPU: for many centres install mlcd_ds[gpu]")
        elif use_gpu:
            import torch

            self._resources = faiss.StandardGpuResources()
            self._index = faiss.index_cpu_to_gpu(self._resources, torch.cuda.current_device(), self._index)

    def set_centers(self, centers_CE: np.ndarray) -> None:
        self._index.reset()
        self._index.add(np.ascontiguousarray(centers_CE, dtype=np.float32))

    def search(self, rows_BE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return self._index.search(np.ascontiguousarray(rows_BE, dtype=np.float32), k)
