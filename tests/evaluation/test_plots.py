import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from mlcd_ds.evaluation.linear_probe import ProbeResult, linear_probe
from mlcd_ds.evaluation.plots import comparison_plot, confusion_plot

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def result() -> ProbeResult:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(220) % 11
    features = 0.35 * torch.randn(11, 40, generator=generator)[labels] + torch.randn(220, 40, generator=generator)
    return linear_probe(features[:110], labels[:110], features[110:], labels[110:], 11, generator, num_splits=2)


def test_confusion_plot(result: ProbeResult, tmp_path: Path) -> None:
    confusion_plot(result, [f"class {i}" for i in range(11)], tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").read_bytes().startswith(PNG)
    with pytest.raises(ValueError, match="2 class_names for 11"):
        confusion_plot(result, ["a", "b"], tmp_path / "none.png")


def test_the_confusion_of_a_thousand_classes_fits_a_page(result: ProbeResult, tmp_path: Path) -> None:
    many = dataclasses.replace(result, confusion_CC=torch.eye(1000, dtype=torch.int64))
    confusion_plot(many, [str(number) for number in range(1000)], tmp_path / "many.png")
    with Image.open(tmp_path / "many.png") as image:
        assert max(image.size) < 4000


def test_comparison_plot(tmp_path: Path) -> None:
    rows = {
        "raw pixels": {"knn": 0.31, "linear_probe": 0.35, "linear_probe_se": 0.02},
        "random ViT-B/32": {"knn": 0.28, "knn_se": 0.02, "linear_probe": 0.41, "linear_probe_se": 0.02},
        "ours, 2 epochs": {"knn": 0.88, "knn_se": 0.011, "linear_probe": 0.993, "linear_probe_se": 0.003},
    }
    comparison_plot(rows, tmp_path / "comparison.png", chance=1 / 11)
    assert (tmp_path / "comparison.png").read_bytes().startswith(PNG)
    with pytest.raises(ValueError, match="'top5'"):
        comparison_plot({"ours": {"top5": 0.9}}, tmp_path / "none.png", chance=0.1)


def test_importing_does_not_import_matplotlib() -> None:
    code = "import sys, mlcd_ds.evaluation.plots; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
