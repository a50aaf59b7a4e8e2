"""Where a training step makes the host wait for a GPU: nowhere in our part, and where DeepSpeed does.

Counted on a CPU that DeepSpeed takes for a device with streams, the head's GPU branches forced.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from distributed_harness import TinyData, run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_runs import tiny_recipe

from mlcd_ds.config import parse_recipe
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.distributed.ds_config import read_ds_config
from mlcd_ds.engine.layout import plan_batches
from mlcd_ds.engine.trainer import Trainer
from mlcd_ds.engine.training_data import open_training_data
from mlcd_ds.stages.train import read_layout, resolve_ds_config

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim")
NUM_WARM, NUM_STEPS, MANY = 2, 3, 500  # elements of what is a gradient, not a flag or a norm
# Of a step under a file of ours, with other settings: numbers that DeepSpeed reads (whether a gradient overflowed; the
# norm, three times), and its waits for the whole device or one of its streams.
EXPECTED: dict[tuple[str, str], dict[str, int]] = {
    ("zero1_bf16", "as it is"): {"deepspeed number": 4, "deepspeed device": 1},
    ("zero1_bf16", "without overlap_comm"): {"deepspeed number": 4},
    ("zero1_bf16", "without check_grad_overflow"): {"deepspeed number": 2, "deepspeed device": 1},
    ("zero2_bf16", "as it is"): {"deepspeed number": 4, "deepspeed device": 1},
    ("zero3_bf16", "as it is"): {"deepspeed number": 1, "deepspeed device": 2},
    ("zero0_bf16", "as it is"): {},
}
TWINS = ("allowed to wait", "with timers", "without communication_data_type")  # of zero1_bf16


class Waits(TorchDispatchMode):
    """Counts operators whose result the host needs, by whether DeepSpeed or our package called them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.added_up: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "reduce" in func.__name__ and owner(sys._getframe()) == "deepspeed":
            self.added_up |= {tensor.dtype for tensor in tree_leaves(args) if is_many(tensor)}
        is_mask = func.__name__.startswith("index.") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if func.__name__.split(".")[0] in WAITING or is_mask:
            self.counts[f"{owner(sys._getframe())} number"] += 1
        return func(*args, **(kwargs or {}))

    def synchronize(self, *_: object) -> None:
        self.counts[f"{owner(sys._getframe())} device"] += 1


def is_many(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() > MANY


def owner(frame: FrameType | None) -> str:
    """deepspeed or mlcd_ds, whichever is the innermost caller."""
    while frame:
        for name in ("deepspeed", "mlcd_ds"):
            if f"/{name}/" in frame.f_code.co_filename:
                return name
        frame = frame.f_back
    return "neither"


def as_if_with_streams(waits: Waits) -> None:
    """DeepSpeed's accelerator becomes one whose work is queued; for this process."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.accelerator.real_accelerator import set_accelerator

    class Stream:
        def wait_stream(self, *_: object) -> None: ...

        wait_event = record = wait_stream
        synchronize = waits.synchronize

        def query(self) -> bool:
            return True

    class Queued(CPU_Accelerator):
        def is_synchronized_device(self) -> bool:
            return False

        def synchronize(self, device_index: int | None = None) -> None:
            waits.synchronize()

        def stream(self, stream: object) -> contextlib.AbstractContextManager[None]:
            return contextlib.nullcontext()

        Stream = Event = property(lambda self: Stream)

        def current_stream(self, device_index: int | None = None) -> Stream:
            return Stream()

        default_stream = current_stream

    set_accelerator(Queued())
    torch.Tensor.record_stream = lambda *_: None


def count(group: Group, data: TinyData, name: str, change: str) -> tuple[dict[str, float], set[torch.dtype]]:
    """Waits of a step, by who waits; and the types in which gradients were added up."""
    path = DS_CONFIGS / f"{name}.json"
    config = read_ds_config(path)
    if change == "without overlap_comm":
        config["zero_optimization"]["overlap_comm"] = False
    if change == "without check_grad_overflow":
        config["bf16"]["check_grad_overflow"] = False
    if change == "without communication_data_type":
        del config["communication_data_type"]
    content = tiny_recipe(data.index, data.labels)
    content["train"]["precision"] = "bf16"
    recipe, layout = parse_recipe(content, "test"), read_layout(config, path, 1)
    ds_config = resolve_ds_config(config, path, recipe, layout, plan_batches(recipe, layout, 0))
    if change == "with timers":
        del ds_config["timers"]
    waits = Waits()
    as_if_with_streams(waits)
    trainer = Trainer(recipe, ds_config, layout, open_training_data(recipe), group, torch.device("cpu"))
    trainer.objective.head.allow_host_sync = change == "allowed to wait"
    batches = trainer.batches(0)
    for step in range(NUM_WARM):
        trainer.step(step, batches)
    ready = [next(batches) for _ in range(NUM_STEPS)]
    batches.close()
    waits.counts.clear()
    with waits:
        for step, batch in enumerate(ready, NUM_WARM):
            trainer.step(step, iter([batch]))
    return {who: number / NUM_STEPS for who, number in waits.counts.items()}, waits.added_up


def count_all(group: Group, data: TinyData) -> dict[tuple[str, str], tuple[dict[str, float], set[torch.dtype]]]:
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    # zero0_bf16 comes last: DeepSpeed's autocast stays switched on in a process.
    cases = [*(("zero1_bf16", twin) for twin in TWINS), *EXPECTED]
    return {case: count(group, data, *case) for case in cases}


@pytest.fixture(scope="module")
def counted(tiny_data: TinyData) -> dict[tuple[str, str], tuple[dict[str, float], set[torch.dtype]]]:
    return run_ranks(count_all, 1, tiny_data)[0]


@pytest.mark.parametrize("case", EXPECTED)
def test_only_deepspeed_waits(counted: dict, case: tuple[str, str]) -> None:
    assert counted[case][0] == EXPECTED[case]


def test_waits_are_noticed(counted: dict) -> None:
    """The known-bad twins: a head that lists what was touched, and DeepSpeed's clock."""
    assert counted["zero1_bf16", "allowed to wait"][0]["mlcd_ds number"] == 2
    assert counted["zero1_bf16", "with timers"][0]["deepspeed device"] == 3


@pytest.mark.parametrize("name", ["zero0_bf16", "zero1_bf16", "zero2_bf16", "zero3_bf16"])
def test_gradients_are_added_up_in_fp32(counted: dict, name: str) -> None:
    assert counted[name, "as it is"][1] == {torch.float32}
    assert counted["zero1_bf16", "without communication_data_type"][1] == {torch.bfloat16}
