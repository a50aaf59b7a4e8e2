"""What rounding does to a gradient that many ranks add up, as a ring does it: one rank after the other.

  python benchmarks/gradient_sums.py

Each rank's gradient is a common part and its own noise, of the given ratio of deviations. A ring in 16 bits rounds the
sum at each rank; one in fp32 rounds once, when the sum is put back to 16 bits. Printed is the error's Frobenius norm
over the exact mean's.
"""

from __future__ import annotations

import sys

import torch

NUM_ELEMENTS = 200_000


def ring_error(num_ranks: int, noise: float, travels: torch.dtype) -> float:
    """Relative error of the mean over ranks of bf16 gradients."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(NUM_ELEMENTS, generator=generator)
    total, exact = torch.zeros(NUM_ELEMENTS, dtype=travels), torch.zeros(NUM_ELEMENTS, dtype=torch.float64)
    for _ in range(num_ranks):
        gradient = (common + noise * torch.randn(NUM_ELEMENTS, generator=generator)).bfloat16() / num_ranks
        exact += gradient.double()
        total = (total.float() + gradient.float()).to(travels)  # a hop adds in fp32, and sends what it has rounded
    return float((total.bfloat16().double() - exact).norm() / exact.norm())


def main() -> None:
    """Print the table."""
    sys.stdout.write("ranks, noise over common part: bf16, fp32\n")
    for num_ranks in (8, 80, 1024):
        for noise in (0.0, 1.0, 10.0):
            errors = [ring_error(num_ranks, noise, travels) for travels in (torch.bfloat16, torch.float32)]
            sys.stdout.write(f"{num_ranks:5} {noise:4.0f}: {errors[0]:.2%} {errors[1]:.2%}\n")


if __name__ == "__main__":
    main()
