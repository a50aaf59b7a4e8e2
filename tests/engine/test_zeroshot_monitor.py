"""Zero-shot accuracy while a run trains: what `mlcd evaluate` says of the checkpoint, on any layout, and no change to
the training."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from distributed_harness import TinyData, assert_close, assert_differs, run_ranks
from pair_trainers import go_on, make_trainer, train_mlcd
from shard_maker import Finished, encode, picture, run_child, run_stage, write_tar
from torch import Tensor
from training_runs import DS_CONFIG, tiny_recipe

from mlcd_ds.config import parse_recipe
from mlcd_ds.data import reference
from mlcd_ds.data.dali import WholeImages
from mlcd_ds.data.pixels import clip_pixels
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.engine.layout import Layout
from mlcd_ds.engine.monitors import ZeroShotMonitor
from mlcd_ds.errors import UserError
from mlcd_ds.evaluation.prompts import read_templates

NAMES = ["animal", "red heart", "tool", "plant"]
NUM_LABELLED, NUM_OTHERS = 13, 2
LAYOUTS = {(1, 1): (0, 3), (2, 1): (1, 3), (2, 2): (0,)}  # by ranks and tensor-parallel size: ZeRO stages


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an index of pictures, most of them labelled, and the names of their classes."""
    folder = tmp_path_factory.mktemp("labelled")
    members = []
    for number in range(NUM_LABELLED + NUM_OTHERS):
        label = number % len(NAMES) if number < NUM_LABELLED else None
        members.append((f"{number:02d}.jpg", encode(picture(number))))
        members.append((f"{number:02d}.json", json.dumps({"label": label}).encode()))
    write_tar(folder / "0.tar", members)
    assert run_stage("index", "--shards", folder / "0.tar", "--out", folder / "index").status == 0
    (folder / "classes.json").write_text(json.dumps(NAMES))
    return folder


def sections(folder: Path) -> dict[str, dict[str, Any]]:
    data = {"knn_index": str(folder / "index"), "classes": str(folder / "classes.json")}
    return {"train": {"zeroshot_every": 1}, "data": data}


def monitored(
    group: Group, data: TinyData, folder: Path, labelled: Path, tensor_parallel: int
) -> dict[tuple[str, int], Any]:
    """Embeddings and accuracy of CLIP and LiT before training, and after two steps, under each layout."""
    os.environ.update(RANK=str(group.rank), WORLD_SIZE=str(group.size), LOCAL_RANK=str(group.rank))
    found: dict[tuple[str, int], Any] = {}
    train_mlcd(data, folder / "mlcd", group)
    for name in ("clip", "lit"):
        for stage in LAYOUTS[group.size, tensor_parallel]:
            layout = Layout(group.size, tensor_parallel, stage)
            out = folder / f"{name}-{stage}"
            trainer = make_trainer(data, out, layout, group, name, 1, sections=sections(labelled))
            monitor = trainer.monitors["zeroshot"][1]
            assert isinstance(monitor, ZeroShotMonitor)
            before = torch.cat(monitor.embeddings()).double()
            curve = go_on(trainer, 0, 2)
            found[name, stage] = before, torch.cat(monitor.embeddings()).double(), monitor.accuracy()
            trainer.engine.destroy()
            plain = make_trainer(data, out, layout, group, name, 1)
            assert not plain.monitors and torch.equal(go_on(plain, 0, 2), curve), "the monitor changes the training"
            plain.engine.destroy()
    return found


def by_hand(group: Group, data: TinyData, folder: Path, labelled: Path) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """The monitor's embeddings, and those of pictures by the plain loader and of texts one by one; and a known-bad
    twin, pictures mirrored and names in another order."""
    os.environ.update(RANK=str(group.rank), WORLD_SIZE=str(group.size), LOCAL_RANK=str(group.rank))
    trainer = make_trainer(data, folder, Layout(1, 1, 0), group, "clip", 1, sections=sections(labelled))
    monitor, tokenizer, text = trainer.monitors["zeroshot"][1], trainer.data.tokenizer, trainer.recipe.text
    assert isinstance(monitor, ZeroShotMonitor) and tokenizer and text
    encoded = [encode(picture(number)) for number in range(NUM_LABELLED)]
    whole = WholeImages(encoded, np.full((NUM_LABELLED, 2), 40))
    images_N3SS = reference.load_whole(whole, clip_pixels(trainer.recipe.model.image_size))

    def classes(names: list[str]) -> Tensor:
        texts = [[template.replace("{}", name) for template in read_templates("clip_7")] for name in names]
        tokens = [torch.from_numpy(tokenizer.encode(of_class, text.context)) for of_class in texts]
        embedded = [F.normalize(trainer.embed("text", rows, is_projected=True), dim=1) for rows in tokens]
        return torch.stack([F.normalize(rows.mean(dim=0), dim=0) for rows in embedded])

    images_NE, classes_CE = monitor.embeddings()
    twin_NE, right_NE = (trainer.embed("image", x, is_projected=True) for x in (images_N3SS.flip(3), images_N3SS))
    return {
        "images": (images_NE.double(), right_NE.double(), twin_NE.double()),
        "classes": (classes_CE.double(), classes(NAMES).double(), classes(NAMES[::-1]).double()),
    }


def test_it_embeds_what_it_says(tiny_data: TinyData, labelled: Path, tmp_path: Path) -> None:
    for name, (found, right, twin) in run_ranks(by_hand, 1, tiny_data, tmp_path, labelled)[0].items():
        tolerance = {"images": 0.02, "classes": 1e-6}[name]  # DALI's pixels differ a little from the plain loader's
        assert_close(name, found, right, tolerance)
        assert_differs(f"{name}: twin", found, twin, tolerance)


def test_every_layout_says_the_same(tiny_data: TinyData, labelled: Path, tmp_path: Path) -> None:
    expected: dict[tuple[str, int], Any] = {}
    for num_ranks, size in LAYOUTS:
        folder = tmp_path / f"{num_ranks}-{size}"
        for found in run_ranks(monitored, num_ranks, tiny_data, folder, labelled, size, timeout_s=300):
            expected = expected or found
            for (name, stage), (before, after, accuracy) in found.items():
                right = expected[name, 0]
                if before is right[0]:
                    assert len(before) == NUM_LABELLED + len(NAMES)
                    assert_differs(f"{name}: trained", after, before, 1e-4)
                    continue
                what = f"{name}, {num_ranks} ranks, tensor parallel {size}, ZeRO {stage}"
                # LiT's image tower was trained for a step by as many ranks, and differs by rounding.
                assert_close(f"{what}: before", before, right[0], 1e-5)
                assert_close(f"{what}: after", after, right[1], 1e-4)
                assert accuracy == right[2]


def train(
    folder: Path, data: TinyData, labelled: Path, *overrides: str, run: Callable[..., Finished] = run_stage
) -> tuple[int, str]:
    """`mlcd train` of two steps of CLIP with the demo's words."""
    content = tiny_recipe(data.index, data.labels)
    content |= {"objective": {"name": "clip"}, "head": {}}
    content["text"] = dict(width=32, depth=1, heads=4, mlp_width=64, embed_dim=16, context=12)
    for section, keys in sections(labelled).items():
        content[section] |= keys
    content["train"] |= {"steps": 2, "out": str(folder / "run")}
    content["optimizer"] |= {"warmup_steps": 1, "lr": 1e-2}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    finished = run("train", "--deepspeed_config", DS_CONFIG, "--recipe", folder / "recipe.yaml", *overrides)
    assert "Traceback" not in finished.err, finished.err
    return finished.status, finished.err


def test_it_says_what_evaluate_says(tiny_data: TinyData, labelled: Path, tmp_path: Path) -> None:
    status, told = train(tmp_path, tiny_data, labelled, run=run_child)
    assert status == 0, told
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    accuracies = [entry["evaluation/zeroshot"] for entry in entries if "evaluation/zeroshot" in entry]
    finished = run_stage(
        *("evaluate", "--model", tmp_path / "run", "--protocols", "zeroshot", "--templates", "clip_7"),
        *("--test-index", labelled / "index", "--classes", labelled / "classes.json", "--out", tmp_path / "evaluation"),
    )
    assert finished.status == 0, finished.err
    report = json.loads((tmp_path / "evaluation" / "report.json").read_text())["zeroshot"]
    assert len(accuracies) == 2 and accuracies[-1] == report["acc1"] and report["num_images"] == NUM_LABELLED


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.classes=null", r"train\.zeroshot_every is given, but data\.classes is not: add data\.classes=FILE"),
        ("data.knn_index=null", r"train\.zeroshot_every is given, but data\.knn_index is not"),
        ("data.classes=nowhere.json", r"nowhere\.json is missing"),
        ("data.classes=SHORT", r"short\.json has 2 names, but data\.knn_index .* has label 3"),
        ("data.templates=BAD", r"bad\.txt: template 2, 'a photo', must have \{\}"),
    ],
)
def test_what_does_not_fit_is_one_message(
    tiny_data: TinyData, labelled: Path, tmp_path: Path, override: str, message: str
) -> None:
    (tmp_path / "short.json").write_text(json.dumps(NAMES[:2]))
    (tmp_path / "bad.txt").write_text("a {}\na photo\n")
    override = override.replace("SHORT", str(tmp_path / "short.json")).replace("BAD", str(tmp_path / "bad.txt"))
    status, told = train(tmp_path, tiny_data, labelled, override)
    assert status == 2 and re.search(message, told), told
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_without_texts_it_is_refused(tiny_data: TinyData, labelled: Path) -> None:
    content = tiny_recipe(tiny_data.index, tiny_data.labels)
    for section, keys in sections(labelled).items():
        content[section] |= keys
    with pytest.raises(UserError, match=r"train\.zeroshot_every is given, but the run has no text tower"):
        parse_recipe(content, "test")
