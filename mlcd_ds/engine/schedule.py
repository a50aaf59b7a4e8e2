"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, steps: int, warmup_steps: int, peak: float, final_fraction: float) -> float:
    """Linear from peak / warmup_steps to `peak`, then half a cosine down to `final_fraction * peak` at the last step.

    `step` counts from 0.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return peak * (final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
