"""The product of two tiles in Triton, which the kernels of the head and of the clustering begin with."""

from __future__ import annotations

import triton
import triton.language as tl

NUM_WARPS = 8


def tile_shape(is_bf16: bool) -> tuple[int, int, int]:
    """Rows on the left, rows on the right and features of a tile.

    bf16 has tensor cores. In fp32 a tile's sums and factors are in registers: larger ones would spill to memory.
    tests/kernels compiles both and looks.
    """
    return (128, 128, 64) if is_bf16 else (128, 64, 16)


@triton.jit
def tile_product(
    left_ptr,
    right_ptr,
    left_rows,
    right_rows,
    num_left,
    num_right,
    num_features,
    block_l: tl.constexpr,
    block_r: tl.constexpr,
    block_e: tl.constexpr,
):
    """fp32 [block_l, block_r]: rows int64 of `left` [num_left, E] times rows of `right` [num_right, E].

    The inner dimension is cut into `block_e`; rows behind the end count as zero; fp32 is not rounded to tf32.
    """
    features = tl.arange(0, block_e)
    product = tl.zeros((block_l, block_r), dtype=tl.float32)
    for first in range(0, num_features, block_e):
        is_feature = first + features < num_features
        left = tl.load(
            left_ptr + left_rows[:, None] * num_features + first + features[None, :],
            mask=(left_rows < num_left)[:, None] & is_feature[None, :],
            other=0.0,
        )
        right = tl.load(
            right_ptr + right_rows[:, None] * num_features + first + features[None, :],
            mask=(right_rows < num_right)[:, None] & is_feature[None, :],
            other=0.0,
        )
        product = tl.dot(left, tl.trans(right), acc=product, input_precision="ieee")
    return product
