"""What the engine trains in a checkpoint: whole tensors, so that any layout can read what another has written.

`backbone.safetensors` holds the image tower's fp32 weights, `text.safetensors` the text tower's, and
`objective.safetensors` what the engine trains for the objective, all by a tower's own names; `ema...safetensors` their
moving averages where the run keeps them. `moments-RANK.safetensors` hold the optimizer's moments as "MOMENT/PARAMETER",
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
from mlcd_ds.distributed.engine_state import AVERAGE, EngineState
from mlcd_ds.engine.tensor_parallel import gather_full, local_shard
from mlcd_ds.engine.weights import AVERAGE_FILES, WEIGHT_FILES, CheckpointManifest, older_checkpoint
from mlcd_ds.errors import UserError
from mlcd_ds.models.towers import split_name

MOMENTS_NAME = re.compile(r"moments-\d+\.safetensors")


def save_training_state(folder: Path, state: EngineState, group: Group, tensor_group: Group | None) -> None:
    """Write weights and moments below `folder`. Collective: a whole tensor at a time is on every rank."""
    files: dict[str, dict[str, Tensor]] = {}  # of rank 0
    moments: dict[str, Tensor] = {}
    dealt = [0] * group.size  # elements of moments for each rank to write
    is_begun = state.num_updates > 0
    for name in state.names:
        tower, own_name = split_name(name)
        kinds = ((WEIGHT_FILES, None), *(((AVERAGE_FILES, AVERAGE),) if state.has_average else ()))
        for names, moment in kinds:
            tensor = gather_full(name, state.get(name, moment), tensor_group)
            if group.is_main:
                files.setdefault(names[tower], {})[own_name] = tensor.to("cpu", copy=True).contiguous()
        writer = dealt.index(min(dealt))
        for moment in state.moments(name) if is_begun else ():
            tensor = gather_full(name, state.get(name, moment), tensor_group)
            dealt[writer] += tensor.numel()
            if writer == group.rank:
                moments[f"{moment}/{name}"] = tensor.to("cpu", copy=True).contiguous()
    if moments:
        files[f"moments-{group.rank:05d}.safetensors"] = moments
    try:
        for file_name, tensors in files.items():
            save_file(tensors, folder / file_name)
    except SafetensorError as error:
        raise OSError(str(error)) from None


def load_training_state(
    folder: Path, state: EngineState, tensor_group: Group | None, manifest: CheckpointManifest
) -> None:
    """Restore a new engine from what any layout wrote. Collective. UserError names the file and what it lacks."""

    fix = older_checkpoint(folder)
    with ExitStack() as stack:
        opened = {
            name: stack.enter_context(open_tensors(folder / name, fix))
            for name in manifest.files
            if MOMENTS_NAME.fullmatch(name) or name in {*WEIGHT_FILES.values(), *AVERAGE_FILES.values()}
        }
        moments = {key: file for name, file in opened.items() if MOMENTS_NAME.fullmatch(name) for key in file.names}

        def own(name: str, names: dict[str, str]) -> Tensor:
            tower, own_name = split_name(name)
            file = opened.get(names[tower])
            if file is None or own_name not in file.names:
                raise UserError(f"{folder} holds no {own_name}. {fix}")
            return local_shard(name, file.tensor(own_name), tensor_group)

        num_updates = manifest.num_updates or 0
        state.begin(num_updates, manifest.loss_scale)
        for name in state.names:
            state.set(name, own(name, WEIGHT_FILES))
            for moment in state.moments(name) if num_updates else ():
                if (key := f"{moment}/{name}") not in moments:
                    raise UserError(f"{folder} holds no {key}. {fix}")
                state.set(name, local_shard(name, moments[key].tensor(key), tensor_group), moment)
        if state.has_average:
            state.begin_average()  # from these weights, where the run had no average before
            for name in state.names:
                if AVERAGE_FILES[split_name(name)[0]] in opened:
                    state.set(name, own(name, AVERAGE_FILES), AVERAGE)
    state.finish()
