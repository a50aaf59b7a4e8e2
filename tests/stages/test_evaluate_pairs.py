"""Zero-shot and retrieval by `mlcd evaluate`: against transformers, on ranks, CLIP_benchmark's layout, refusals."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from clip_folder import write_clip
from commands import message_of
from distributed_harness import run_ranks
from PIL import Image
from shard_maker import DEMO_SHARDS, read_independently, run_stage, write_tar

from mlcd_ds.distributed.collectives import Group
from mlcd_ds.evaluation.prompts import read_templates
from mlcd_ds.stages import evaluate
from mlcd_ds.stages.runner import Context

CLASSES = DEMO_SHARDS / "classes.json"
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NUM_IMAGES = 100  # in two shards
COUNTS = (70, 30)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"), image_size=128, patch_size=32)


def captions_of(number: int, sample: dict[str, bytes]) -> list[str]:
    """One caption of most images, two of some, as lines with an empty one between."""
    caption = sample["txt"].decode().strip()
    return [caption, f"{caption} again"] if number % 3 == 0 else [caption]


@pytest.fixture(scope="module")
def samples() -> list[dict[str, bytes]]:
    found = list(read_independently(DEMO_SHARDS / "test/00000.tar"))[:NUM_IMAGES]
    assert len(found) == NUM_IMAGES
    return found


@pytest.fixture(scope="module")
def index(samples: list[dict[str, bytes]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, first = tmp_path_factory.mktemp("pairs"), 0
    for shard, count in enumerate(COUNTS):
        members = []
        for number in range(first, first + count):
            sample = samples[number]
            text = "\n\n".join(captions_of(number, sample))
            members += [(f"{number}.jpg", sample["jpg"]), (f"{number}.txt", text.encode())]
            members += [(f"{number}.json", sample["json"])] if number % 10 else []  # some have no label
        write_tar(folder / f"{shard}.tar", members)
        first += count
    finished = run_stage("index", "--shards", folder / "*.tar", "--out", folder / "index")
    assert finished.status == 0, finished.err
    return folder / "index"


@pytest.fixture(scope="module")
def expected(samples: list[dict[str, bytes]], clip: Path) -> dict[str, list[int]]:
    """By transformers and the definition in float64: places of the classes, images and captions."""
    from transformers import AutoTokenizer, CLIPModel

    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)

    def texts_of(texts: list[str]) -> torch.Tensor:
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
        pooled = model.text_model(**tokens).pooler_output
        return F.normalize(model.text_projection(pooled).double(), dim=1)

    mean, deviation = (torch.tensor(values)[:, None, None] for values in (OPENAI_MEAN, OPENAI_STD))
    names = json.loads(CLASSES.read_text())
    images = []
    with torch.inference_mode():
        for sample in samples:
            picture = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
            assert picture.size == (128, 128), "nothing is resized: both sides see the same pixels"
            pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(128, 128, 3)
            row = ((pixels.permute(2, 0, 1) / 255 - mean) / deviation)[None]
            images.append(model.visual_projection(model.vision_model(row).pooler_output)[0].double())
        rows = F.normalize(torch.stack(images), dim=1)
        prompts = [[template.replace("{}", name) for template in read_templates("clip_7")] for name in names]
        classes = torch.stack([F.normalize(texts_of(texts).mean(0), dim=0) for texts in prompts])
        captions = [(number, text) for number, sample in enumerate(samples) for text in captions_of(number, sample)]
        texts = texts_of([text for _, text in captions])
    places = []
    for number, sample in enumerate(samples):
        if number % 10:
            similarity = (classes @ rows[number]).tolist()
            places.append(sum(value > similarity[json.loads(sample["json"])["label"]] for value in similarity))
    similarity = (texts @ rows.T).tolist()
    of_text = [sum(v > line[n] for v in line) for line, (n, _) in zip(similarity, captions, strict=True)]
    of_image = []
    for number in range(NUM_IMAGES):
        column = [line[number] for line in similarity]
        best = max(value for value, (owner, _) in zip(column, captions, strict=True) if owner == number)
        of_image.append(sum(value > best for value in column))
    return {"classes": places, "of_text": of_text, "of_image": of_image}


def flags(clip: Path, index: Path, out: Path, *more: object) -> list[str]:
    given = ["--model", clip, "--test-index", index, "--classes", CLASSES, "--templates", "clip_7", "--out", out]
    return [str(flag) for flag in (*given, "--protocols", "zeroshot", "retrieval", *more)]


@pytest.fixture(scope="module")
def evaluated(clip: Path, index: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "out"
    finished = run_stage("evaluate", *flags(clip, index, out))
    assert finished.status == 0, finished.err
    return out


def test_hits_are_those_of_transformers(evaluated: Path, expected: dict[str, list[int]]) -> None:
    report = json.loads((evaluated / "report.json").read_text())
    zeroshot, retrieval = report["zeroshot"], report["retrieval"]
    places = expected["classes"]
    assert zeroshot["num_images"] == len(places) == 90
    assert [zeroshot["num_hits1"], zeroshot["num_hits5"]] == [sum(place < k for place in places) for k in (1, 5)]
    assert 0 < zeroshot["num_hits1"] < zeroshot["num_hits5"] < 90
    assert (retrieval["num_images"], retrieval["num_texts"]) == (NUM_IMAGES, len(expected["of_text"])) == (100, 134)
    for k in (1, 5, 10):
        for way, of in (("image", "of_text"), ("text", "of_image")):
            assert retrieval[f"{way}_retrieval_recall@{k}"] == sum(p < k for p in expected[of]) / len(expected[of])
    assert retrieval["image_retrieval_recall@10"] > 0


def test_other_texts_hit_otherwise(clip: Path, index: Path, evaluated: Path, tmp_path: Path) -> None:
    """Known-bad twins: other templates, and the names in another order."""
    (tmp_path / "t.txt").write_text("not a {}\n")
    names = json.loads(CLASSES.read_text())
    (tmp_path / "classes.txt").write_text("\n".join(names[1:] + names[:1]))
    expected = json.loads((evaluated / "report.json").read_text())["zeroshot"]
    for number, more in enumerate((("--templates", tmp_path / "t.txt"), ("--classes", tmp_path / "classes.txt"))):
        out = tmp_path / f"out{number}"
        given = [*flags(clip, index, out)[:-3], "--protocols", "zeroshot"]
        finished = run_stage("evaluate", *given, *more)
        assert finished.status == 0, finished.err
        found = json.loads((out / "report.json").read_text())["zeroshot"]
        assert found["num_hits1"] != expected["num_hits1"] or found["num_hits5"] != expected["num_hits5"]


def test_the_page_is_whole_and_names_are_escaped(evaluated: Path) -> None:
    page = (evaluated / "report.html").read_text()
    assert set(re.findall(r"""(?:src|href)=["']?(.{5})""", page)) == {"data:"} and "://" not in page
    for heading in ("best classes", "worst classes", "confusion", "surest hits", "surest misses", "Image retrieval"):
        assert heading in page
    assert page.count("<img") > 40 and "its own image is number" in page


def test_results_have_clip_benchmarks_keys(evaluated: Path, index: Path, clip: Path) -> None:
    found = {path.stem: json.loads(path.read_text()) for path in (evaluated / "clip_benchmark").iterdir()}
    assert set(found) == {"zeroshot_classification", "zeroshot_retrieval"}
    for task, result in found.items():
        assert list(result) == ["dataset", "model", "pretrained", "task", "metrics", "language"]
        assert result["task"] == task and result["dataset"] == str(index) and result["pretrained"] == str(clip)
    assert list(found["zeroshot_classification"]["metrics"]) == ["acc1", "acc5", "mean_per_class_recall"]
    recalls = [f"{way}_retrieval_recall@{k}" for way in ("image", "text") for k in (1, 5, 10)]
    assert sorted(found["zeroshot_retrieval"]["metrics"]) == sorted(recalls)


def on_ranks(group: Group, clip: Path, index: Path, out: Path) -> str:
    parser = evaluate.runner.build_parser(evaluate.Options, "evaluate", "")
    options = evaluate.runner.parse_options(evaluate.Options, parser, flags(clip, index, out))
    evaluate.run(options, Context(group, torch.device("cpu")))
    group.barrier()
    return (out / "report.json").read_text()


def test_two_ranks_report_what_one_does(clip: Path, index: Path, evaluated: Path, tmp_path: Path) -> None:
    """Of the shards, 70 and 30 images, each computes one; of the images each measures a half."""
    for report in run_ranks(on_ranks, 2, clip, index, tmp_path / "out", timeout_s=300.0):
        assert report == (evaluated / "report.json").read_text()


def test_what_is_done_is_not_done_again(clip: Path, index: Path, evaluated: Path) -> None:
    assert "done already" in run_stage("evaluate", *flags(clip, index, evaluated)).err
    other = flags(clip, index, evaluated)
    other[other.index("clip_7")] = "clip_80"
    assert "templates" in message_of(run_stage("evaluate", *other))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"--model": "pixels@8"}, ["--protocols zeroshot retrieval", "pixels@8", "both towers"]),
        ({"--protocols": "zeroshoot"}, ["--protocols", "'zeroshoot'", "retrieval"]),
        ({"--protocols": "knn"}, ["--train-index", "missing"]),
        ({"--classes": None}, ["--classes", "missing"]),
        ({"--classes": "few.json"}, ["few.json", "2 names", "label"]),
        ({"--classes": "gone.json"}, ["gone.json", "missing"]),
        ({"--templates": "bad.txt"}, ["bad.txt", "template 1", "{}"]),
        ({"--label-key": "nothing"}, ["'nothing'", "no sample has a label"]),
    ],
)
def test_what_cannot_be_measured_is_one_message(
    clip: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict, told: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.json").write_text('["animal", "building"]')
    (tmp_path / "bad.txt").write_text("a photo\n")
    given = {"--model": clip, "--test-index": index, "--classes": CLASSES, "--out": "out", "--protocols": "zeroshot"}
    words = [str(word) for pair in (given | changed).items() if pair[1] is not None for word in pair]
    message = message_of(run_stage("evaluate", *words))
    assert all(text in message for text in told), message


def test_an_image_without_a_caption_is_named(clip: Path, samples: list[dict[str, bytes]], tmp_path: Path) -> None:
    members = [("0.jpg", samples[0]["jpg"]), ("0.txt", b"one"), ("1.jpg", samples[1]["jpg"]), ("1.txt", b" \n")]
    shard = write_tar(tmp_path / "s.tar", members)
    assert run_stage("index", "--shards", shard, "--out", tmp_path / "index").status == 0
    given = ["--model", clip, "--test-index", tmp_path / "index", "--out", tmp_path / "out", "--protocols", "retrieval"]
    message = message_of(run_stage("evaluate", *given))
    assert str(shard) in message and "key 1" in message and "caption" in message


def test_clip_benchmarks_layout_is_read(clip: Path, samples: list[dict[str, bytes]], tmp_path: Path) -> None:
    """test/nshards.txt, N.tar with .cls, classnames.txt, zeroshot_classification_templates.txt: as the demo's own."""
    members, labelled = [], []
    for number, sample in enumerate(samples[:30]):
        label = json.loads(sample["json"])["label"]
        labelled += [(f"{number}.jpg", sample["jpg"]), (f"{number}.json", json.dumps({"label": label}).encode())]
        members += [(f"{number}.cls", str(label).encode()), (f"{number}.jpg", sample["jpg"])]
    write_tar(tmp_path / "wds/test/0.tar", members)
    (tmp_path / "wds/test/nshards.txt").write_text("1")
    names = json.loads(CLASSES.read_text())
    (tmp_path / "wds/classnames.txt").write_text("\n".join(names) + "\n")
    lines = [template.replace("{}", "{c}") for template in read_templates("clip_7")]
    (tmp_path / "wds/templates.txt").write_text("\n".join(lines) + "\n")
    own = write_tar(tmp_path / "own.tar", labelled)
    reports = []
    texts = ("--classes", tmp_path / "wds/classnames.txt", "--templates", tmp_path / "wds/templates.txt")
    plain = ("--classes", CLASSES, "--templates", "clip_7")
    for name, shards, given in (("wds", tmp_path / "wds/test", texts), ("own", own, plain)):
        assert run_stage("index", "--shards", shards, "--out", tmp_path / f"{name}-index").status == 0
        out = ("--test-index", tmp_path / f"{name}-index", "--out", tmp_path / f"{name}-out")
        finished = run_stage("evaluate", "--model", clip, "--protocols", "zeroshot", *given, *out)
        assert finished.status == 0, finished.err
        reports.append(json.loads((tmp_path / f"{name}-out/report.json").read_text()))
    assert reports[0] == reports[1] and reports[0]["zeroshot"]["num_images"] == 30
