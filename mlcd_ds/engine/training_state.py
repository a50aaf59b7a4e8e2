"""The backbone and its optimizer in a checkpoint: whole tensors, so that any layout can read what another has written.

`backbone.safetensors` holds the fp32 weights, `ema.safetensors` their moving average where the run keeps one, and
`moments-RANK.safetensors` the optimizer's moments as "MOMENT/PARAMETER", dealt over the ranks that wrote them.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mlcd_ds.artefacts.readers import TensorFile, open_tensors
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.distributed.engine_state import AVERAGE, EngineState
from mlcd_ds.engine.tensor_parallel import gather_full, local_shard
from mlcd_ds.engine.weights import AVERAGE_NAME, BACKBONE_NAME, CheckpointManifest, older_checkpoint
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

    fix = older_checkpoint(folder)

    def own(places: dict[str, TensorFile], name: str, key: str) -> Tensor:
        if key not in places:
            raise UserError(f"{folder} holds no {key}. {fix}")
        return local_shard(name, places[key].tensor(key), tensor_group)

    num_updates = manifest.num_updates or 0
    state.begin(num_updates, manifest.loss_scale)
    names = [BACKBONE_NAME, *(name for name in manifest.files if MOMENTS_NAME.fullmatch(name))]
    with ExitStack() as stack:
        files = [stack.enter_context(open_tensors(folder / name, fix)) for name in names]
        places = {key: file for file in files for key in file.names}
        for name in state.names:
            state.set(name, own(places, name, name))
            for moment in state.moments(name) if num_updates else ():
                state.set(name, own(places, name, f"{moment}/{name}"), moment)
    if state.has_average:
        state.begin_average()  # from these weights, where the run had no average before
        if AVERAGE_NAME in manifest.files:
            with open_tensors(folder / AVERAGE_NAME, fix) as file:
                for name in state.names:
                    state.set(name, own(dict.fromkeys(file.names, file), name, name), AVERAGE)
    state.finish()
