"""The learning rate, and the decay of the weights' average, as pure functions of the step."""

from __future__ import annotations

import math

from mlcd_ds.recipes.sections import OptimizerConfig


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """The rate of step `step`, counted from 0, of a run of `steps`.

    Linear from lr / warmup_steps to lr; then, by `schedule`, half a cosine down to final_lr * lr at the last step, or
    lr until the last `cooldown_steps`, which fall linearly to the same. The rate before a cool-down does not depend on
    `steps`: a longer run begins as a shorter one does.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
        part = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    else:
        part = min(1.0, (steps - 1 - step) / config.cooldown_steps) if config.cooldown_steps else 1.0
    return config.lr * (config.final_lr + (1 - config.final_lr) * part)


def average_decay(step: int, decay: float) -> float:
    """The decay of the weights' average after step `step`, counted from 0: at first small, as the start is random."""
    return min(decay, (1 + step) / (10 + step))
