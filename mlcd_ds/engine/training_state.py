"""The backbone and its optimizer in a checkpoint: whole tensors, so that any layout can read what another has written.

`backbone.safetensors` holds the fp32 weights; `moments-RANK.safetensors` the optimizer's moments as "MOMENT/PARAMETER",
dealt over the ranks that wrote them.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from mlcd_ds.distributed.collectives import Group
from mlcd_ds.distributed.engine_state import EngineState
from mlcd_ds.engine.tensor_parallel import own_part, whole
from mlcd_ds.engine.weights import BACKBONE_NAME
from mlcd_ds.errors import UserError
from mlcd_ds.manifest import write_atomic


def save_training_state(folder: Path, state: EngineState, group: Group, tensor_group: Group | None) -> None:
    """Write weights and moments below `folder`. Collective: a whole tensor at a time is on every rank."""
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    is_begun = state.num_updates > 0
    for number, name in enumerate(state.names):
        tensor = whole(name, state.get(name), tensor_group)
        if group.is_main:
            weights[name] = tensor.to("cpu", copy=True).contiguous()
        for moment in state.moments(name) if is_begun else ():
            tensor = whole(name, state.get(name, moment), tensor_group)
            if number % group.size == group.rank:
                moments[f"{moment}/{name}"] = tensor.to("cpu", copy=True).contiguous()
    try:
        if weights:
            write_atomic(folder / BACKBONE_NAME, lambda file: file.write(save(weights)))
        if moments:
            save_file(moments, folder / f"moments-{group.rank:05d}.safetensors")
    except SafetensorError as error:
        raise OSError(str(error)) from None


def load_training_state(
    folder: Path, state: EngineState, tensor_group: Group | None, num_updates: int, loss_scale: dict[str, float]
) -> None:
    """Restore a new engine from what any layout wrote. Collective. UserError names the file and what it lacks."""
    state.begin(num_updates, loss_scale)
    moments = {key: path for path in folder.glob("moments-*.safetensors") for key in _keys(path)}
    for name in state.names:
        state.set(name, own_part(name, _read(folder / BACKBONE_NAME, name), tensor_group))
        for moment in state.moments(name) if num_updates else ():
            key = f"{moment}/{name}"
            if key not in moments:
                raise UserError(f"{folder} holds no {key}: {_fix(folder)}.")
            state.set(name, own_part(name, _read(moments[key], key), tensor_group), moment)
    state.finish()


def _fix(folder: Path) -> str:
    return f"remove {folder} to resume from an older checkpoint"


def _keys(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}): {_fix(path.parent)}.") from None


def _read(path: Path, key: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}): {_fix(path.parent)}.") from None
