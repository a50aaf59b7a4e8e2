"""What a DeepSpeed engine trains, whole and in fp32, however ZeRO spreads it over the data-parallel ranks.

DeepSpeed's own checkpoints hold each rank's part: only the same number of ranks at the same ZeRO stage can read them.
Whole weights and moments can be written by one layout and read by any other. A class for each ZeRO family knows where
DeepSpeed keeps them. A *master* is an fp32 tensor that the optimizer steps on: a rank's masters hold all it updates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ADAM_MOMENTS, MUON_MOMENTS = ("exp_avg", "exp_avg_sq"), ("momentum_buffer",)
AVERAGE = "average"  # of the weights: kept beside the moments, and read and set like them
SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def engine_state(engine: Any) -> EngineState:
    """The state of an engine, by its ZeRO stage."""
    families = (WholeState, PartitionedState, PartitionedState, ShardedState)
    return families[engine.zero_optimization_stage()](engine)


class EngineState(ABC):
    """Weights, moments, the number of updates and the loss scale of an engine; parameters go by the names that the
    module has for them in checkpoints (models/towers.py).

    In a tensor-parallel group, each rank's state covers its own part only. To restore into a new engine: `begin`, then
    `set` weights and moments of all parameters, then `finish`.
    """

    def __init__(self, engine: Any) -> None:
        self._engine, self._zero = engine, engine.optimizer
        self._adam = getattr(engine.optimizer, "optimizer", engine.optimizer)  # torch's, wrapped or not
        self._parameters: dict[str, Any] = dict(engine.module.stored_parameters())
        self.has_average = False

    @property
    def names(self) -> list[str]:
        """All parameters, in the model's order."""
        return list(self._parameters)

    @property
    def num_updates(self) -> int:
        """Optimizer steps so far, skipped ones not counted. Before the first there are no moments. The host waits."""
        return next((int(state["step"]) for state in self._adam.state.values() if "step" in state), 0)

    @property
    def loss_scale(self) -> dict[str, float]:
        """The dynamic loss scale of fp16 training; empty where there is none."""
        scaler = self._scaler()
        return {name: value for name in SCALER_FIELDS if (value := getattr(scaler, name, None)) is not None}

    @property
    def is_finite(self) -> bool:
        """Whether all weights that this rank updates, and their moments, are finite. The host waits."""
        states = [self._adam.state.get(master, {}) for *_, master in self._masters()]
        moments = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        masters = [master.detach() for *_, master in self._masters()]
        return all(bool(tensor.isfinite().all()) for tensor in (*masters, *moments))

    def moments(self, name: str) -> tuple[str, ...]:
        """Names of a parameter's moments."""
        return MUON_MOMENTS if getattr(self._parameters[name], "use_muon", False) else ADAM_MOMENTS

    @abstractmethod
    def get(self, name: str, moment: str | None = None) -> Tensor:
        """fp32 weights, or a moment, of a parameter's shape. Collective over the data-parallel ranks."""

    @abstractmethod
    def set(self, name: str, value: Tensor, moment: str | None = None) -> None:
        """Copy whole weights, or a whole moment, to where this rank keeps its part."""

    def begin(self, num_updates: int, loss_scale: dict[str, float]) -> None:
        """Make room for the moments of so many updates (none at 0), and set the loss scale."""
        for name in SCALER_FIELDS:
            if name in loss_scale and hasattr(self._scaler(), name):
                setattr(self._scaler(), name, loss_scale[name])
        if num_updates:
            for number, group, master in self._masters():
                self._adam.state[master] = self._zero_moments(number, group, master, num_updates)

    def begin_average(self) -> None:
        """From now on keep a moving average of this rank's masters, starting from their present values."""
        self.has_average = True
        for number, group, master in self._masters():
            if not self._adam.state[master]:  # the optimizer makes its moments where there is no state yet
                self._adam.state[master] = self._zero_moments(number, group, master, 0)
            self._adam.state[master][AVERAGE] = master.detach().clone()

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """average <- decay * average + (1 - decay) * weights. No collective, and the host does not wait."""
        masters = [master.detach() for *_, master in self._masters()]
        averages = [self._adam.state[master][AVERAGE] for *_, master in self._masters()]
        torch._foreach_lerp_(averages, masters, 1 - decay)

    def finish(self) -> None:  # noqa: B027  nothing to do in most families
        """Call after everything was set. Collective at stage 3."""

    @abstractmethod
    def _masters(self) -> Iterator[tuple[int, dict[str, Any], Tensor]]:
        """Number of a parameter group, the group, and each of its masters."""

    def _zero_moments(self, number: int, group: dict[str, Any], master: Tensor, num_updates: int) -> dict[str, Any]:
        if group.get("use_muon", False):
            return {MUON_MOMENTS[0]: master.detach().new_zeros(self._muon_shape(number, master))}
        # DeepSpeed's AdamW beside Muon counts in int, torch's on the device.
        is_torchs = isinstance(self._adam, torch.optim.AdamW)
        step = torch.tensor(float(num_updates), device=master.device) if is_torchs else num_updates
        return {"step": step, **{moment: torch.zeros_like(master.detach()) for moment in ADAM_MOMENTS}}

    def _muon_shape(self, number: int, master: Tensor) -> torch.Size:
        return master.shape

    def _scaler(self) -> Any:
        """What holds the loss scale, where it is dynamic."""
        if not self._engine.fp16_enabled():
            return None
        scaler = getattr(self._zero, "loss_scale_config", None) or self._zero.loss_scaler
        return scaler if getattr(scaler, "dynamic_loss_scale", hasattr(scaler, "cur_iter")) else None


class WholeState(EngineState):
    """Stage 0: a master for each parameter, whole on every rank; except in fp16, the parameter itself."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._master = {parameter: parameter for parameter in self._parameters.values()}
        if hasattr(self._zero, "fp32_groups"):  # fp16
            for shorts, masters in zip(self._zero.fp16_groups, self._zero.fp32_groups, strict=True):
                self._master |= dict(zip(shorts, masters, strict=True))

    def get(self, name: str, moment: str | None = None) -> Tensor:
        return self._place(name, moment).detach().float()

    @torch.no_grad()
    def set(self, name: str, value: Tensor, moment: str | None = None) -> None:
        self._place(name, moment).copy_(value)
        if moment is None:
            self._parameters[name].copy_(value)

    def _place(self, name: str, moment: str | None) -> Tensor:
        master = self._master[self._parameters[name]]
        return master if moment is None else self._adam.state[master][moment]

    def _masters(self) -> Iterator[tuple[int, dict[str, Any], Tensor]]:
        for number, group in enumerate(self._adam.param_groups):
            yield from ((number, group, master) for master in group["params"])


class PartitionedState(EngineState):
    """Stages 1 and 2: a rank updates one contiguous piece of each parameter group, its master, and has all weights."""

    def get(self, name: str, moment: str | None = None) -> Tensor:
        parameter = self._parameters[name]
        if moment in MUON_MOMENTS:
            return self._muon_moment(parameter)
        whole = torch.zeros(parameter.numel(), device=parameter.device)
        if parameter._hp_mapping is not None:
            self._own_slice(parameter, whole).copy_(self._piece(parameter, moment))
        dist.all_reduce(whole, group=self._zero.dp_process_group)
        return whole.view(parameter.shape)

    @torch.no_grad()
    def set(self, name: str, value: Tensor, moment: str | None = None) -> None:
        parameter = self._parameters[name]
        value = value.to(parameter.device)
        if moment in MUON_MOMENTS:
            for buffer, _ in self._muon_buffers(parameter):
                buffer.copy_(value.flatten())
        elif parameter._hp_mapping is not None:
            self._piece(parameter, moment).copy_(self._own_slice(parameter, value.flatten()))
        if moment is None:
            parameter.copy_(value)

    def _piece(self, parameter: Any, moment: str | None) -> Tensor:
        """This rank's flat piece of a parameter, as a view; the rank must have one.

        DeepSpeed's own mapping of moments is not used: it is made after the first group's step, before others have any.
        """
        mapping = parameter._hp_mapping
        if moment is None:
            return mapping.hp_fragment.detach()
        master = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
        place = mapping.hp_fragment_address
        return self._adam.state[master][moment].narrow(0, place.start, place.numel)

    def _own_slice(self, parameter: Any, whole: Tensor) -> Tensor:
        place = parameter._hp_mapping.lp_fragment_address
        return whole.narrow(0, place.start, place.numel)

    def _masters(self) -> Iterator[tuple[int, dict[str, Any], Tensor]]:
        for number, group in enumerate(self._adam.param_groups):
            yield from ((number, group, master) for master in group["params"])

    def _muon_shape(self, number: int, master: Tensor) -> torch.Size:
        return torch.Size([sum(parameter.numel() for parameter in self._zero.params_in_partition[number])])

    def _muon_buffers(self, parameter: Tensor) -> Iterator[tuple[Tensor, bool]]:
        """The parameter's whole momentum, where this rank has a piece; and whether that is the first piece.

        Every rank with a piece of a matrix keeps the momentum of all of it.
        """
        for number, group, master in self._masters():
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


class ShardedState(EngineState):
    """Stage 3: each parameter is cut into equal parts, the last one padded; a rank has and updates one of each."""

    def get(self, name: str, moment: str | None = None) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self._parameters[name]
        if moment is None:
            return safe_get_full_fp32_param(parameter).detach()
        return safe_get_full_optimizer_state(parameter, moment).detach()

    def begin(self, num_updates: int, loss_scale: dict[str, float]) -> None:
        super().begin(num_updates, loss_scale)
        self._zero.checkpoint_event_prologue()

    @torch.no_grad()
    def set(self, name: str, value: Tensor, moment: str | None = None) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        parameter, group = self._parameters[name], self._zero.dp_process_group
        size, rank = parameter.ds_tensor.numel(), dist.get_rank(group)
        padded = torch.zeros(size * dist.get_world_size(group), dtype=value.dtype, device=parameter.device)
        padded[: value.numel()] = value.flatten()
        part = padded[rank * size : (rank + 1) * size]
        if moment is None:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, moment)

    def finish(self) -> None:
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

    def _masters(self) -> Iterator[tuple[int, dict[str, Any], Tensor]]:
        for part, master in enumerate(self._zero.fp32_partitioned_groups_flat):
            number = self._zero.sub_group_to_group_id[part]
            yield number, self._adam.param_groups[number], master
