"""What the DeepSpeed engine is given: the file's mechanics, and everything that the recipe says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlcd_ds.config import Recipe
from mlcd_ds.data.loader import StreamSlice
from mlcd_ds.distributed.ds_config import check_zero_section, fill_ds_config, tensor_parallel_size
from mlcd_ds.engine.layout import Layout
from mlcd_ds.engine.precision import is_autocast
from mlcd_ds.engine.tensor_parallel import autotp_section
from mlcd_ds.errors import UserError


def read_layout(config: dict[str, Any], path: Path, num_ranks: int) -> Layout:
    """How the DeepSpeed file spreads the backbone over the ranks."""
    return Layout(num_ranks, tensor_parallel_size(config, path), check_zero_section(config, path))


def resolve_ds_config(
    config: dict[str, Any], path: Path, recipe: Recipe, layout: Layout, batch_slice: StreamSlice
) -> dict[str, Any]:
    """The DeepSpeed config with everything that the recipe says filled in."""
    precision = recipe.train.precision
    source = f"train.precision={precision} in the recipe"
    if recipe.optimizer.name == "muon" and "grad_accum_dtype" in config.get("data_types", {}):
        raise UserError(f"{path}: data_types.grad_accum_dtype is not for optimizer.name muon: leave it out.")
    has_autocast = is_autocast(precision, layout.zero_stage)
    if has_autocast:
        source = "ZeRO stage 0, where bf16 is torch's autocast over fp32 weights,"
    values = {
        "train_batch_size": (recipe.train.global_batch, "train.global_batch in the recipe"),
        "train_micro_batch_size_per_gpu": (batch_slice.micro_batch, "train.micro_batch_per_rank in the recipe"),
        "gradient_accumulation_steps": (batch_slice.num_micro_batches, "train.global_batch over ranks and micro-batch"),
        # Muon's orthogonalised update would be clipped in place of its gradient.
        "gradient_clipping": (
            0.0 if recipe.optimizer.name == "muon" else recipe.optimizer.clip_norm,
            "optimizer.clip_norm in the recipe (0 with muon)",
        ),
        "bf16.enabled": (precision == "bf16" and not has_autocast, source),
        "fp16.enabled": (precision == "fp16", source),
    }
    config = fill_ds_config(config, path, values)
    config.setdefault("zero_optimization", {})["stage"] = layout.zero_stage
    if has_autocast:
        if "torch_autocast" in config:
            raise UserError(f"{path}: torch_autocast is not set here: in bf16 at ZeRO stage 0 it follows the recipe.")
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    if layout.tensor_parallel > 1:
        config["tensor_parallel"] = autotp_section(layout.tensor_parallel)
    config.setdefault("steps_per_print", 10**9)  # progress is ours to show
    config["timers"] = {"throughput": {"enabled": False}}  # its clock would wait for the device twice a step
    return config
