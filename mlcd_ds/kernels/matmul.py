"""Matrix products of head and clustering: inputs rounded to bf16 where asked for, sums and results in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Matmul:
    """Products in fp32, or with inputs rounded to bf16. float64 tensors stay float64: tests want no rounding.

    CUDA multiplies bf16 tensors into fp32 results. The CPU has no such call: there the tensors stay fp32. Where the CPU
    has bf16 tiles, oneDNN rounds what it multiplies; elsewhere it would not, and `cast` does.
    """

    is_bf16: bool
    device_type: str

    def cast(self, rows: Tensor) -> Tensor:
        """What products of this kind take."""
        if rows.dtype == torch.float64:
            return rows
        if not self.is_bf16:
            return rows.float()
        if self.device_type == "cuda":
            return rows.bfloat16()
        return rows.float() if torch.cpu._is_amx_tile_supported() else rows.bfloat16().float()

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        """`left @ right`, at least fp32."""
        if left.dtype == torch.bfloat16:
            return torch.mm(left, right, out_dtype=torch.float32)
        return left @ right

    def add(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """`total += left @ right`, in place."""
        if left.dtype == torch.bfloat16:
            total += self(left, right)
        else:
            total.addmm_(left, right)

    @contextmanager
    def active(self) -> Iterator[None]:
        """A context in which the CPU's products follow these settings."""
        backend = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009 (set at run time, so no type checker knows it)
        before = backend.fp32_precision
        backend.fp32_precision = "bf16" if self.is_bf16 and self.device_type == "cpu" else before
        try:
            yield
        finally:
            backend.fp32_precision = before
