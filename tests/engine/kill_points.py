"""Kill a process at every moment of a checkpoint's save, in turn; called by test_kill_points.py in a fresh process.

Each child is a fork: it resumes what the one before it left, starts to save the next step, and kills itself ahead of
the n-th write that Python's audit events tell of (opening a file to write, making, renaming and removing).
Prints a line a child: n, the step it resumed from, the event it died at.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from training_runs import DS_CONFIG, tiny_recipe

from mlcd_ds.config import parse_recipe
from mlcd_ds.distributed.deepspeed import initialize_engine
from mlcd_ds.distributed.ds_config import choose_accelerator, fill_ds_config, read_ds_config
from mlcd_ds.distributed.engine_state import engine_state
from mlcd_ds.distributed.groups import ParallelGroups
from mlcd_ds.distributed.launch import Launch, process_group
from mlcd_ds.engine import training_state
from mlcd_ds.engine.checkpoint import Checkpointer
from mlcd_ds.engine.layout import Layout
from mlcd_ds.engine.optimizer import backbone_optimizer
from mlcd_ds.heads import head_state
from mlcd_ds.models.towers import Towers
from mlcd_ds.models.vit import ViT
from mlcd_ds.objectives.class_centres import ClassCentres

MOST_POINTS = 200
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"}


def is_change(event: str, args: tuple[Any, ...], folder: str) -> bool:
    """Whether an audit event is a write below the folder."""
    if event == "open" and not isinstance(args[0], int):
        return folder in os.fsdecode(args[0]) and bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in CHANGES and folder in str(args[0])


def torn_first(save_file: Callable[..., None]) -> Callable[..., None]:
    """safetensors writes without an audit event: so a part is written before, and told of."""

    def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
        path.write_bytes(b"torn")
        sys.audit("open", str(path), "wb", os.O_WRONLY)
        save_file(tensors, path)

    return save


def child(out: Path, point: int, report: int) -> None:
    """Resume, then save the next step and die at its `point`-th write."""
    content = tiny_recipe(Path("index"), Path("labels"))
    content["train"] |= {"out": str(out), "keep_checkpoints": 1}
    recipe = parse_recipe(yaml.safe_load(yaml.safe_dump(content)), "kill points")
    for module in (training_state, head_state):
        module.save_file = torn_first(module.save_file)
    with process_group(Launch(0, 0, 1, 1)) as group:
        backbone = Towers({"image": ViT(recipe.model)})
        backbone.init_weights(torch.Generator().manual_seed(0))
        batch = {"train_batch_size": (4, "test"), "train_micro_batch_size_per_gpu": (4, "test")}
        batch |= {"gradient_accumulation_steps": (1, "test"), "gradient_clipping": (1.0, "test")}
        config = fill_ds_config(read_ds_config(DS_CONFIG), DS_CONFIG, batch)
        engine = initialize_engine(backbone, backbone_optimizer(backbone, recipe.optimizer), config)
        groups, data = ParallelGroups(group), SimpleNamespace(labels=SimpleNamespace(num_centers=5))
        objective = ClassCentres(recipe, data, groups, torch.device("cpu"))
        objective.init_weights()
        objective.head.grad_LE.fill_(1)
        objective.head.touched_L.fill_(1)
        objective.step(recipe.optimizer.lr)
        state = engine_state(engine)
        state.begin_average()
        checkpointer = Checkpointer(recipe, Layout(1, 1, 1), state, objective, groups, {}, config)
        step = checkpointer.resume()
        os.write(report, f"{point} {step} ".encode())
        left = point

        def count_down(event: str, args: tuple[Any, ...]) -> None:
            nonlocal left
            if is_change(event, args, str(out)):
                left -= 1
                if left == 0:
                    os.write(report, f"{event}\n".encode())
                    os.kill(os.getpid(), signal.SIGKILL)

        if point:
            sys.addaudithook(count_down)
        checkpointer.save(step + 1)
        os.write(report, b"saved\n")


def load_once() -> None:
    """What takes long and can be shared by the forks: imports."""
    choose_accelerator()
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (torch.compile's own imports)


def main(out: Path) -> int:
    """Fork children until one gets through. Point 0 saves the first checkpoint in peace."""
    torch.set_num_threads(1)
    load_once()
    for point in range(MOST_POINTS):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                child(out, point, sys.stdout.fileno())
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status) and (point or os.WEXITSTATUS(status)):
            return os.WEXITSTATUS(status)
    return 3


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
