"""The report's figures against their definitions, and the page that an assign leaves."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from distributed_harness import TinyData
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mlcd_ds.clustering.report import Extremes, agreement, gini, size_figures
from mlcd_ds.stages import assign


def test_gini_is_the_mean_difference_over_twice_the_mean() -> None:
    sizes = np.random.default_rng(0).integers(0, 100, size=31)
    wanted = np.abs(sizes[:, None] - sizes).mean() / (2 * sizes.mean())
    assert gini(sizes) == pytest.approx(wanted) and gini(sizes) != pytest.approx(gini(sizes[1:]), abs=1e-4)
    assert gini(np.full(7, 5)) == pytest.approx(0) and gini(np.array([0] * 99 + [1])) == pytest.approx(0.99)


def test_figures_of_sizes() -> None:
    figures = size_figures(np.array([0, 3, 5, 92] + [1] * 196))
    assert figures["min"] == 0 and figures["max"] == 92 and figures["median"] == 1 and figures["empty"] == 1
    assert figures["share_in_largest_1_percent"] == pytest.approx(97 / 296)


def test_agreement_by_counting_pairs() -> None:
    generator = np.random.default_rng(0)
    classes = generator.integers(0, 4, size=400)
    assert agreement(classes + 7, classes) == {"labelled_images": 400, "purity": 1.0, "nmi": pytest.approx(1.0)}
    clusters = np.where(generator.random(400) < 0.7, classes, generator.integers(0, 9, size=400))
    found = agreement(clusters, classes)
    purity = sum(np.bincount(classes[clusters == c]).max() for c in np.unique(clusters)) / 400
    joint = {(a, b): np.mean((clusters == a) & (classes == b)) for a, b in itertools.product(range(9), range(4))}
    mutual = sum(
        p * np.log(p / (np.mean(clusters == a) * np.mean(classes == b))) for (a, b), p in joint.items() if p > 0
    )
    entropy = [-sum(np.mean(x == v) * np.log(np.mean(x == v)) for v in np.unique(x)) for x in (clusters, classes)]
    assert found["purity"] == pytest.approx(purity) and found["nmi"] == pytest.approx(2 * mutual / sum(entropy))
    assert agreement(generator.permutation(clusters), classes)["nmi"] < 0.1, "known-bad twin: no relation"


def test_extremes_do_not_depend_on_the_order_of_shards() -> None:
    generator = np.random.default_rng(0)
    shards = [(i, generator.integers(0, 3, size=50), generator.random(50)) for i in range(4)]
    found = []
    for order in (shards, shards[::-1]):
        extremes = Extremes([0, 2], 5)
        for shard in order:
            extremes.see(*shard)
        found.append(extremes.members)
    assert found[0] == found[1] and len(found[0][0]) == 10
    values = np.sort(np.concatenate([s[n == 0] for _, n, s in shards]))[::-1]
    assert [member[0] for member in found[0][0]] == pytest.approx([*values[:5], *values[-5:]])


def test_the_page_stands_alone(tiny_data: TinyData, tmp_path: Path) -> None:
    arguments = ["--embeddings", tiny_data.embeddings, "--clusters", tiny_data.clusters, "--num-labels", 3]
    arguments += ["--index", tiny_data.index, "--out", tmp_path / "labels"]
    assert assign.main([str(argument) for argument in arguments]) == 0
    text = (tmp_path / "labels" / "report.html").read_text()
    sources = re.findall(r"(?:src|href)=[\"']?([^\"' >]+)", text)
    assert len(sources) > 30 and all(source.startswith("data:image/") for source in sources)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    report = json.loads((tmp_path / "labels" / "report.json").read_text())
    sizes = np.load(tmp_path / "labels" / "sizes.npy")
    assert report["sizes"]["max"] == sizes.max() and report["sizes"]["images"] == 100
    similarities = list(report["similarity to the labels"].values())
    assert len(similarities) == 3 and similarities == sorted(similarities, reverse=True)
    assert 0 < report["agreement with the classes"]["purity"] <= 1
    events = EventAccumulator(str(tmp_path / "labels" / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("clusters/objective")) == len(report["objective"])
    assert "clusters/images_per_center" in events.Tags()["histograms"]


def test_another_index_is_refused(tiny_data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads((tiny_data.index / "manifest.json").read_text())
    (tmp_path / "index").mkdir()
    for path in tiny_data.index.iterdir():
        if path.is_file():
            (tmp_path / "index" / path.name).write_bytes(path.read_bytes())
    content["inputs"] = {**content["inputs"], "of": "another"}
    (tmp_path / "index" / "manifest.json").write_text(json.dumps(content))
    arguments = ["--embeddings", tiny_data.embeddings, "--clusters", tiny_data.clusters, "--num-labels", 3]
    arguments += ["--index", tmp_path / "index", "--out", tmp_path / "labels"]
    assert assign.main([str(argument) for argument in arguments]) == 2
    assert "--index" in capsys.readouterr().err
