"""The comparison of demo/compare.py: every system is a recipe that differs in what it says; the page shows records."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mlcd_ds.config import changed_keys, load_recipe

DEMO = Path(__file__).resolve().parents[1] / "demo"


@pytest.fixture(scope="module", autouse=True)
def demo_on_path() -> object:
    sys.path.insert(0, str(DEMO))
    yield
    sys.path.remove(str(DEMO))


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_every_system_is_a_recipe_that_differs_in_what_it_says() -> None:
    systems, base = module("compare_systems"), load_recipe(str(DEMO / "compare.yaml"))
    ablations = [ablation.system(value) for ablation in systems.ABLATIONS.values() for value in ablation.values]
    for system in (*systems.SYSTEMS.values(), *ablations):
        start = ("train.init_from=runs/none",) if system.starts_from else ()
        recipe = load_recipe(str(DEMO / "compare.yaml"), (*system.keys, *start))
        changed = {key.split(".")[0] for key in changed_keys(base, recipe)}
        assert changed <= {"objective", "head", "text", "towers", "train"}, system
        assert [key for key in changed_keys(base, recipe) if key.startswith("train.")] == ["train.init_from"] * len(
            start
        )
        assert (recipe.text is not None) == system.has_text
    for ablation in systems.ABLATIONS.values():
        assert ablation.default in ablation.values
        assert ablation.system(ablation.default).keys == systems.SYSTEMS["mlcd"].keys


def test_tables_have_means_and_errors_over_seeds(tmp_path: Path) -> None:
    page = module("compare_page")
    for seed, score in enumerate((0.50, 0.52, 0.57)):
        (tmp_path / f"clip-seed{seed}.json").write_text(json.dumps({"scores": {"knn": score}}))
    scores = page.scores_of(tmp_path, [f"clip-seed{seed}" for seed in range(4)])
    assert scores == {"knn": [0.50, 0.52, 0.57]}
    assert (
        page.shown(scores["knn"]) == "53.0 ± 2.1"
        and page.shown(scores["knn"][:1]) == "50.0"
        and page.shown(None) == "-"
    )
    lines = page.table("system", {"CLIP": scores, "nCLIP": {}}, {"knn": "kNN"})
    assert lines == ["| system | kNN | seeds |", "|---|---:|---:|", "| CLIP | 53.0 ± 2.1 | 3 |", "| nCLIP | - | 0 |"]


def test_a_page_is_written_between_its_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, file, records = module("compare_page"), tmp_path / "page.md", tmp_path / "runs"
    records.mkdir()
    file.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    monkeypatch.setattr(page, "PAGE", file)
    for name in ("clip-seed0", "mlcd-seed0", "mlcd-m0-seed0", "tuning-clip-lr0.001"):
        scores = {"knn": 0.5, "linear_probe": 0.6, "zeroshot": 0.1}
        (records / f"{name}.json").write_text(json.dumps({"scores": scores}))
    for _ in range(2):
        page.write_page(records)
    text = file.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert (
        text.count("| CLIP | 60.0 | 50.0 | 10.0 |") == 1
        and "| CLIP | 55.0 | - | - |" in text
        and "| 0.3 | 60.0" in text
    )
    assert {path.name for path in tmp_path.glob("*.png")} == {"systems.png", "ablations.png"}


def test_unknown_names_are_told() -> None:
    compare = module("compare")
    assert compare.names_of({"clip": 0, "mlcd": 1})("clip,mlcd") == ["clip", "mlcd"] and compare.names_of({})("") == []
    with pytest.raises(compare.argparse.ArgumentTypeError, match="cilp is none of clip"):
        compare.names_of({"clip": 0})("cilp")
