"""The backbone and its optimizer in a checkpoint: whole tensors, so that any layout can read what another has written.

`backbone.safetensors` holds the fp32 weights; `moments-RANK.safetensors` the optimizer's moments as "MOMENT/PARAMETER",
dealt over the ranks that wrote them.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mlcd_ds.artefacts.readers import open_tensors
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.distributed.engine_state import EngineState
from mlcd_ds.engine.tensor_parallel import gather_full, local_shard
from mlcd_ds.engine.weights import BACKBONE_NAME, CheckpointManifest, older_checkpoint
from mlcd_ds.errors import UserError

MOMENTS_NAME = re.compile(r"moments-\d+\.safetensors")


def save_training_state(folder: Path, state: EngineState, group: Group, tensor_group: Group | None) -> None:
    """Write weights and moments below `folder`. Collective: a whole tensor at a time is on every rank."""
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    dealt = [0] * group.size  # elements of moments for each rank to write
    is_begun = state.num_updates > 0
    for name in state.names:
        tensor = gather_full(name, state.get(name), tensor_group)
        if group.is_main:
            weights[name] = tensor.to("cpu", copy=True).contiguous()
        writer = dealt.index(min(dealt))
        for moment in state.moments(name) if is_begun else ():
            tensor = gather_full(name, state.get(name, moment), tensor_group)
            dealt[writer] += tensor.numel()
            if writer == group.rank:
                moments[f"{moment}/{name}"] = tensor.to("cpu", copy=True).contiguous()
    try:
        if weights:
            save_file(weights, folder / BACKBONE_NAME)
        if moments:
            save_file(moments, folder / f"moments-{group.rank:05d}.safetensors")
    except SafetensorError as error:
        raise OSError(str(error)) from None


def load_training_state(
    folder: Path, state: EngineState, tensor_group: Group | None, manifest: CheckpointManifest
) -> None:
    """Restore a new engine from what any layout wrote. Collective. UserError names the file and what it lacks."""
    num_updates = manifest.num_updates or 0
    state.begin(num_updates, manifest.loss_scale)
    names = [BACKBONE_NAME, *(name for name in manifest.files if MOMENTS_NAME.fullmatch(name))]
    with ExitStack() as stack:
        files = [stack.enter_context(open_tensors(folder / name, older_checkpoint(folder))) for name in names]
        places = {key: file for file in files for key in file.names}

        def own(name: str, key: str) -> Tensor:
            if key not in places:
                raise UserError(f"{folder} holds no {key}. {older_checkpoint(folder)}")
            return local_shard(name, places[key].tensor(key), tensor_group)

        for name in state.names:
            state.set(name, own(name, name))
            for moment in state.moments(name) if num_updates else ():
                state.set(name, own(name, f"{moment}/{name}"), moment)
    state.finish()
