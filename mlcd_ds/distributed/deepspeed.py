"""The only `deepspeed.initialize`, and its optimizers."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from torch import nn

from mlcd_ds.distributed.ds_config import choose_accelerator


def muon_optimizer(groups: list[dict[str, Any]], zero_stage: int) -> torch.optim.Optimizer:
    """DeepSpeed's Muon over groups with a `use_muon` flag, AdamW where it is False; tags the parameters, too."""
    choose_accelerator()
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    class SkippingMuon(MuonWithAuxAdam):
        """Heeds `found_inf` as fused optimizers do, but the host waits for it. For stage 0: see `step_engine`."""

        found_inf: torch.Tensor | None = None

        def step(self, *args: Any, **kwargs: Any) -> Any:
            return None if self.found_inf is not None and self.found_inf else super().step(*args, **kwargs)

    for group in groups:
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]
    return MuonWithAuxAdam(groups) if zero_stage else SkippingMuon(groups)


def initialize_engine(model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """Wrap the backbone. The process group is up already; the head stays outside (see docs/design.md)."""
    choose_accelerator()
    import deepspeed

    # DeepSpeed calls collectives by names that torch 2.13 has replaced: nothing a user could do about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed.logger.setLevel(logging.WARNING)
    # On CPUs DeepSpeed would compile a shared-memory all-reduce for inference and map 69 MB a rank of /dev/shm for it,
    # which a killed process leaves behind. Training never calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    allow_fp16_on_cpus()
    mpu: Any = None
    if (size := config.get("tensor_parallel", {}).get("autotp_size", 1)) > 1:
        from deepspeed.utils import groups

        mpu = groups
        deepspeed.init_distributed(dist_init_required=False)
        mpu._init_tp_mesh_device(tensor_model_parallel_size=size)  # else DeepSpeed divides the batch over all ranks
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # each step sets it; see below
    engine, _, _, _ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, mpu=mpu, dist_init_required=False
    )
    if hasattr(engine.optimizer, "fp32_groups"):  # fp16 without ZeRO: DeepSpeed made a step without gradients
        engine.optimizer.optimizer.state.clear()
    return engine


def allow_fp16_on_cpus() -> None:
    """torch multiplies fp16 on any CPU; DeepSpeed refuses it on those without instructions for it (AVX512-FP16)."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    CPU_Accelerator.is_fp16_supported = lambda _: True


def step_engine(engine: Any) -> float | torch.Tensor | None:
    """`engine.step()`, which acts at the last micro-batch; returns the gradient's norm before clipping then.

    A gradient whose norm is not finite moves nothing, neither weights nor moments, and does not count as an update.
    From stage 1 on, and in fp16, DeepSpeed sees to that. Otherwise it would clip by such a norm and step, and it
    does not return the norm: so the norm is computed here, and torch's fused AdamW skips the step on the device.
    """
    norm = None
    is_whole = engine.zero_optimization_stage() == 0 and not engine.fp16_enabled()
    if is_whole and engine.is_gradient_accumulation_boundary():
        norm = _gradient_norm(engine)
        engine.optimizer.found_inf = (~norm.isfinite()).float()
    engine.step()
    told = engine.get_global_grad_norm()
    return norm if told is None else told


def _gradient_norm(engine: Any) -> torch.Tensor:
    """Norm of all gradients, those of split layers summed over the tensor-parallel group."""
    from deepspeed.runtime.utils import is_model_parallel_parameter

    parameters = [parameter for parameter in engine.module.parameters() if parameter.grad is not None]
    whole, split = (
        torch.nn.utils.get_total_norm([p.grad for p in parameters if is_model_parallel_parameter(p) == is_split])
        for is_split in (False, True)
    )
    if engine.autotp_size() <= 1:
        return whole
    squares = split.square()
    torch.distributed.all_reduce(squares, group=engine.mpu.get_model_parallel_group())
    return (whole.square() + squares).sqrt()
