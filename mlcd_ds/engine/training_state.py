"""The backbone and its optimizer in a checkpoint: whole tensors, so that any layout can read what another has written.

`backbone.safetensors` holds the fp32 weights, `ema.safetensors` their moving average where the run keeps one, and
`moments-RANK.safetensors` the optimizer's moments as "MOMENT/PARAMETER", dealt over the ranks that wrote them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mlcd_ds.distributed.collectives import Group
from mlcd_ds.distributed.engine_state import AVERAGE, EngineState
from mlcd_ds.engine.tensor_parallel import gather_full, local_shard
from mlcd_ds.engine.weights import AVERAGE_NAME, BACKBONE_NAME, CheckpointManifest
from mlcd_ds.errors import UserError

MOMENTS_NAME = re.compile(r"moments-\d+\.safetensors")


def save_training_state(folder: Path, state: EngineState, group: Group, tensor_group: Group | None) -> None:
    """Write weights and moments below `folder`. Collective: a whole tensor at a time is on every rank."""
    weights: dict[str, Tensor] = {}
    averages: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    dealt = [0] * group.size  # elements of moments for each rank to write
    is_begun = state.num_updates > 0
    for name in state.names:
        tensor = gather_full(name, state.get(name), tensor_group)
        if group.is_main:
            weights[name] = tensor.to("cpu", copy=True).contiguous()
        if state.has_average:
            tensor = gather_full(name, state.get(name, AVERAGE), tensor_group)
            if group.is_main:
                averages[name] = tensor.to("cpu", copy=True).contiguous()
        writer = dealt.index(min(dealt))
        for moment in state.moments(name) if is_begun else ():
            tensor = gather_full(name, state.get(name, moment), tensor_group)
            dealt[writer] += tensor.numel()
            if writer == group.rank:
                moments[f"{moment}/{name}"] = tensor.to("cpu", copy=True).contiguous()
    try:
        if weights:
            save_file(weights, folder / BACKBONE_NAME)
        if averages:
            save_file(averages, folder / AVERAGE_NAME)
        if moments:
            save_file(moments, folder / f"moments-{group.rank:05d}.safetensors")
    except SafetensorError as error:
        raise OSError(str(error)) from None


def load_training_state(
    folder: Path, state: EngineState, tensor_group: Group | None, manifest: CheckpointManifest
) -> None:
    """Restore a new engine from what any layout wrote. Collective. UserError names the file and what it lacks."""

    def own(places: dict[str, Any], name: str, key: str) -> Tensor:
        if key not in places:
            raise UserError(f"{folder} holds no {key}. {_fix(folder)}")
        return local_shard(name, places[key].get_tensor(key), tensor_group)

    num_updates = manifest.num_updates or 0
    state.begin(num_updates, manifest.loss_scale)
    names = [BACKBONE_NAME, *(name for name in manifest.files if MOMENTS_NAME.fullmatch(name))]
    with open_tensors([folder / name for name in names]) as places:
        for name in state.names:
            state.set(name, own(places, name, name))
            for moment in state.moments(name) if num_updates else ():
                state.set(name, own(places, name, f"{moment}/{name}"), moment)
    if state.has_average:
        state.begin_average()  # from these weights, where the run had no average before
        if AVERAGE_NAME in manifest.files:
            with open_tensors([folder / AVERAGE_NAME]) as places:
                for name in state.names:
                    state.set(name, own(places, name, name), AVERAGE)
    state.finish()


@contextmanager
def open_tensors(paths: list[Path]) -> Iterator[dict[str, Any]]:
    """For each tensor in safetensors files the open file that holds it."""
    with ExitStack() as stack:
        places: dict[str, Any] = {}
        for path in paths:
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} cannot be read ({error}). {_fix(path.parent)}") from None
            places |= dict.fromkeys(file.keys(), file)
        yield places


def _fix(folder: Path) -> str:
    return f"Remove {folder} to resume from an older checkpoint."
