"""What a DeepSpeed engine trains, whole and in fp32, however ZeRO spreads it over the data-parallel ranks.

DeepSpeed's own checkpoints hold each rank's part, and only as many ranks of the same ZeRO stage can read them. Whole
weights and moments can be written by one layout and read by any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ADAM_MOMENTS, MUON_MOMENTS = ("exp_avg", "exp_avg_sq"), ("momentum_buffer",)
SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class EngineState:
    """Weights, moments, the number of updates and the loss scale of an engine; parameters go by their names.

    Of a tensor-parallel group each rank has its own part here. To restore an engine that is new: `begin`, then `set`
    weights and moments of all parameters, then `finish`.
    """

    def __init__(self, engine: Any) -> None:
        self._engine, self._stage = engine, engine.zero_optimization_stage()
        self._zero = engine.optimizer
        self._adam = getattr(engine.optimizer, "optimizer", engine.optimizer)  # torch's, wrapped or not
        self._parameters = dict(engine.module.named_parameters())
        self._masters = {parameter: parameter for parameter in self._parameters.values()}
        if hasattr(self._zero, "fp32_groups"):  # fp16 without ZeRO
            for shorts, masters in zip(self._zero.fp16_groups, self._zero.fp32_groups, strict=True):
                self._masters |= dict(zip(shorts, masters, strict=True))

    @property
    def names(self) -> list[str]:
        """All parameters, in the model's order."""
        return list(self._parameters)

    @property
    def num_updates(self) -> int:
        """Optimizer steps so far, without those that a loss scale skipped. Without any there are no moments."""
        return max((int(state["step"]) for state in self._adam.state.values() if "step" in state), default=0)

    @property
    def loss_scale(self) -> dict[str, float]:
        """The dynamic loss scale of fp16 training; empty without."""
        scaler = self._scaler()
        return {name: value for name in SCALER_FIELDS if (value := getattr(scaler, name, None)) is not None}

    def moments(self, name: str) -> tuple[str, ...]:
        """Names of a parameter's moments."""
        return MUON_MOMENTS if getattr(self._parameters[name], "use_muon", False) else ADAM_MOMENTS

    def get(self, name: str, moment: str | None = None) -> Tensor:
        """fp32 weights, or a moment, of a parameter's shape. Collective over the data-parallel ranks."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self._parameters[name]
        if self._stage == 0:
            master = self._masters[parameter]
            return (master if moment is None else self._adam.state[master][moment]).detach().float()
        if moment in MUON_MOMENTS:
            return self._muon_moment(parameter)
        if moment is None:
            return safe_get_full_fp32_param(parameter).detach()
        if self._stage < 3:
            self._link_moments(parameter)
        return safe_get_full_optimizer_state(parameter, moment).detach()

    def begin(self, num_updates: int, loss_scale: dict[str, float]) -> None:
        """Make room for the moments of so many updates (none at 0), and set the loss scale."""
        for name in SCALER_FIELDS:
            if name in loss_scale and hasattr(self._scaler(), name):
                setattr(self._scaler(), name, loss_scale[name])
        if num_updates:
            for number, group, master in self._groups():
                if group.get("use_muon", False):
                    size = sum(p.numel() for p in self._zero.params_in_partition[number]) if self._stage else None
                    zeros = torch.zeros_like(master) if size is None else master.new_zeros(size)
                    self._adam.state[master] = {MUON_MOMENTS[0]: zeros.detach()}
                    continue
                is_torchs = isinstance(
                    self._adam, torch.optim.AdamW
                )  # and not the one beside Muon, which counts in int
                step = torch.tensor(float(num_updates), device=master.device) if is_torchs else num_updates
                zeros = {moment: torch.zeros_like(master.detach()) for moment in ADAM_MOMENTS}
                self._adam.state[master] = {"step": step, **zeros}
        if self._stage == 3:
            self._zero.checkpoint_event_prologue()

    @torch.no_grad()
    def set(self, name: str, value: Tensor, moment: str | None = None) -> None:
        """Put whole weights, or a whole moment, to their places on this rank."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        parameter = self._parameters[name]
        value = value.to(parameter.device)
        if self._stage == 3:
            self._set_part(parameter, value, moment)
        elif self._stage == 0:
            master = self._masters[parameter]
            (master if moment is None else self._adam.state[master][moment]).copy_(value)
        elif moment in MUON_MOMENTS:
            for buffer, _ in self._muon_buffers(parameter):
                buffer.copy_(value.flatten())
        elif moment is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            self._link_moments(parameter)
            safe_set_full_optimizer_state(parameter, value, moment)
        if moment is None and self._stage < 3:
            parameter.copy_(value)

    def finish(self) -> None:
        """After all was set. Collective at stage 3."""
        if self._stage == 3:
            zero = self._zero
            for flat, master, shorts in zip(
                zero.fp16_partitioned_groups_flat,
                zero.fp32_partitioned_groups_flat,
                zero.fp16_partitioned_groups,
                strict=True,
            ):
                flat.data.copy_(master.data)
                for short, part in zip(shorts, zero.unflatten(flat, shorts), strict=True):
                    short.data = part.data
            zero.checkpoint_event_epilogue()

    def _scaler(self) -> Any:
        """What holds the loss scale, where it is dynamic."""
        if not self._engine.fp16_enabled():
            return None
        scaler = getattr(self._zero, "loss_scale_config", None) or self._zero.loss_scaler
        return scaler if getattr(scaler, "dynamic_loss_scale", hasattr(scaler, "cur_iter")) else None

    def _groups(self) -> Iterator[tuple[int, dict[str, Any], Tensor]]:
        """Number of a parameter group, the group, and each fp32 tensor that the optimizer steps on."""
        if self._stage == 3:
            for number, master in enumerate(self._zero.fp32_partitioned_groups_flat):
                yield number, self._adam.param_groups[self._zero.sub_group_to_group_id[number]], master
        else:
            for number, group in enumerate(self._adam.param_groups):
                yield from ((number, group, master) for master in group["params"])

    def _link_moments(self, parameter: Any) -> None:
        """Stages 1 and 2: DeepSpeed does so after the step of the first parameter group, when others have none yet."""
        if parameter._hp_mapping is not None and not parameter._hp_mapping.optim_fragment:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _set_part(self, parameter: Tensor, value: Tensor, moment: str | None) -> None:
        """Stage 3: this rank's part of a parameter whose parts are of equal size, the last one padded."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        group = self._zero.dp_process_group
        size, rank = parameter.ds_tensor.numel(), dist.get_rank(group)
        padded = value.new_zeros(size * dist.get_world_size(group))
        padded[: value.numel()] = value.flatten()
        part = padded[rank * size : (rank + 1) * size]
        if moment is None:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, moment)

    def _muon_buffers(self, parameter: Tensor) -> Iterator[tuple[Tensor, bool]]:
        """Stages 1 and 2: the parameter's whole momentum where a piece of it is this rank's; and whether its first is.

        Every rank with a piece of a matrix keeps the momentum of all of it.
        """
        for number, group, master in self._groups():
            if not group.get("use_muon", False):
                continue
            begin = 0
            for place, held in enumerate(self._zero.params_in_partition[number]):
                if held is parameter:
                    buffer = self._adam.state[master][MUON_MOMENTS[0]]
                    is_first = place > 0 or self._zero.first_offset[number] == 0
                    yield buffer[begin : begin + parameter.numel()], is_first
                begin += held.numel()

    def _muon_moment(self, parameter: Tensor) -> Tensor:
        whole = torch.zeros(parameter.numel(), device=parameter.device)
        for buffer, is_first in self._muon_buffers(parameter):
            if is_first:
                whole.copy_(buffer)
        dist.all_reduce(whole, group=self._zero.dp_process_group)
        return whole.view(parameter.shape)
