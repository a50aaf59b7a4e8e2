"""The keys that a DeepSpeed file may have, and their types.

DeepSpeed silently accepts unknown keys at the top and in some of its sections; in others, wrong types end in a stack
trace late in the start. Sections for which it has typed models are checked by these, the rest by the models here.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from mlcd_ds.artefacts.typed import Frozen, first_problem, shown
from mlcd_ds.errors import UserError

Auto = Literal["auto"]
Dtype = Literal["fp32", "fp16", "bf16"]


class FlopsProfiler(Frozen):
    """`flops_profiler`, for which DeepSpeed has no typed model."""

    enabled: bool = False
    recompute_fwd_factor: float = Field(0.0, ge=0)
    profile_step: int = Field(1, ge=0)
    module_depth: int = Field(-1, ge=-1)
    top_modules: int = Field(1, ge=1)
    detailed: bool = True
    output_file: str | None = None


class ActivationCheckpointing(Frozen):
    """`activation_checkpointing`, for which DeepSpeed has no typed model."""

    partition_activations: bool = False
    number_checkpoints: int | None = Field(None, ge=1)
    contiguous_memory_optimization: bool = False
    synchronize_checkpoint_boundary: bool = False
    profile: bool = False
    cpu_checkpointing: bool = False


class DataTypes(Frozen):
    """`data_types`: the other keys that DeepSpeed knows here would change the model itself."""

    grad_accum_dtype: Dtype | None = None


class TorchAutocast(Frozen):
    """`torch_autocast`."""

    enabled: bool = False
    dtype: Literal["float16", "bfloat16", "fp16", "bf16"] | None = None
    lower_precision_safe_modules: list[str] | None = None


class Aio(Frozen):
    """`aio`: reading and writing of offloaded tensors."""

    block_size: int = Field(2**20, ge=1)
    queue_depth: int = Field(8, ge=1)
    intra_op_parallelism: int = Field(1, ge=1)
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: bool = False


class DeepSpeedFile(Frozen):
    """The top of a file: values here, sections by their own models. Optimizer and schedule belong to the recipe."""

    train_batch_size: Auto | Annotated[int, Field(ge=1)] = "auto"
    train_micro_batch_size_per_gpu: Auto | Annotated[int, Field(ge=1)] = "auto"
    gradient_accumulation_steps: Auto | Annotated[int, Field(ge=1)] = "auto"
    gradient_clipping: Auto | Annotated[float, Field(ge=0)] = "auto"
    steps_per_print: Annotated[int, Field(ge=1)] | None = None
    communication_data_type: Dtype | None = None
    prescale_gradients: bool = False
    gradient_predivide_factor: float = Field(1.0, gt=0)
    zero_allow_untested_optimizer: bool = False
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    disable_allgather: bool = False
    bf16: Any = None
    fp16: Any = None
    zero_optimization: Any = None
    tensor_parallel: Any = None
    comms_logger: Any = None
    compile: Any = None
    flops_profiler: Any = None
    activation_checkpointing: Any = None
    data_types: Any = None
    torch_autocast: Any = None
    aio: Any = None


SECTIONS: dict[str, type[BaseModel]] = {
    "flops_profiler": FlopsProfiler,
    "activation_checkpointing": ActivationCheckpointing,
    "data_types": DataTypes,
    "torch_autocast": TorchAutocast,
    "aio": Aio,
}


def check_file(config: Any, path: Path) -> None:
    """Raise UserError for the first key that DeepSpeed does not know or whose value is of another type.

    Imports DeepSpeed: `choose_accelerator` comes first.
    """
    validated(DeepSpeedFile, config, path, "")
    for name, model in {**SECTIONS, **_models_of_deepspeed()}.items():
        validated(model, config.get(name, {}), path, name)


def validated(model: type[BaseModel], values: Any, path: Path, where: str) -> Any:
    """The values as DeepSpeed's or our model. Raises UserError naming file, key and what may stand there."""
    if not isinstance(values, dict):
        name = where or "the file"
        raise UserError(f"{path}: {name} must be a mapping of keys in braces, not {shown(values)}.")
    known = set(model.model_fields) | {field.alias for field in model.model_fields.values() if field.alias}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(sorted(known))}."
            raise UserError(f"{path}: unknown key {shown(_dotted(where, key))}. {hint}")
        field = model.model_fields.get(key)
        extra = field.json_schema_extra if field else None
        if isinstance(extra, dict) and extra.get("deprecated"):
            raise UserError(f"{path}: {_dotted(where, key)} is deprecated: use {extra.get('new_param')}.")
    try:
        return model(**values)
    except ValidationError as error:
        has_key = error.errors()[0]["loc"]
        raise UserError(f"{path}: {where}{'.' if where and has_key else ' '}{first_problem(error)}.") from None
    except (ValueError, TypeError, ArithmeticError, AssertionError) as error:  # DeepSpeed's models raise these, too
        raise UserError(f"{path}: {where}: {error}.") from None


def _dotted(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _models_of_deepspeed() -> dict[str, type[BaseModel]]:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "zero_optimization": DeepSpeedZeroConfig,
        "comms_logger": CommsLoggerConfig,
        "compile": CompileConfig,
    }
