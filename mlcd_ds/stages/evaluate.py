"""Evaluate a frozen model on labelled or captioned shards, by one or several protocols.

  knn        weighted by exp(cosine / 0.07), on features before the projection
  probe      CLIP's logistic regression on these features, its L2 swept on a validation part of the training set, then
             fitted on all of it: the mean of --num-splits such choices. Its +- is one standard error, from the test
             images (bootstrap) and from the choice of the split
  zeroshot   class names in templates, for models with a text tower: top-1, top-5, mean per class
  retrieval  images and captions (one a line of a sample's .txt) both ways, for models with a text tower: R@1, 5, 10

knn and probe learn from --train-index. Labels are class numbers in the samples' .json, or in .cls members as
CLIP_benchmark has them. Features are computed once a shard. Writes report.json, report.html (confusion, best and worst
classes, hits and misses), confusion.png and results that CLIP_benchmark reads.

  mlcd evaluate --model runs/demo/export --train-index runs/demo/index/train --test-index runs/demo/index/test \\
      --out runs/demo/evaluation/trained
  torchrun --nproc-per-node 8 -m mlcd_ds evaluate --model CLIP --protocols zeroshot retrieval --test-index index/test \\
      --classes classnames.txt --out evaluation/clip

--model takes what `mlcd embed --encoder` takes: a Hugging Face folder, the folder of a training run (ema:FOLDER or
--weights ema: the moving average of its weights), pixels, recipe:NAME (untrained), efficientnet-lite0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from mlcd_ds.artefacts.files import write_atomic, write_json
from mlcd_ds.artefacts.html_page import page, table
from mlcd_ds.artefacts.manifest import Manifest, library_versions, write_manifest
from mlcd_ds.artefacts.typed import MAX_BATCH, MAX_THREADS
from mlcd_ds.data.shard_index import ShardIndex
from mlcd_ds.encoders.base import Encoder, PairEncoder
from mlcd_ds.encoders.registry import load_encoder, load_pair_encoder
from mlcd_ds.engine.weights import Weights
from mlcd_ds.errors import UserError
from mlcd_ds.evaluation.prompts import read_names, read_templates
from mlcd_ds.evaluation.ranks import Ranks
from mlcd_ds.stages import runner
from mlcd_ds.stages.per_shard import work_key
from mlcd_ds.stages.protocols import knn, probe, retrieval, zeroshot
from mlcd_ds.stages.protocols.base import Outcome
from mlcd_ds.stages.protocols.labelled import count_classes, labelled
from mlcd_ds.stages.protocols.rows import Computing, refuse_not_finite

Protocol = Literal["knn", "probe", "zeroshot", "retrieval"]
OF_FEATURES: tuple[Protocol, ...] = ("knn", "probe")
OF_PAIRS: tuple[Protocol, ...] = ("zeroshot", "retrieval")


class Options(runner.StageOptions):
    """Options of `mlcd evaluate`."""

    model: str = Field(description="encoder to evaluate, as for `mlcd embed --encoder`")
    weights: Weights = Field("last", description="of a training run: its last, or their average (ema)")
    protocols: tuple[Protocol, ...] = Field(OF_FEATURES, description="knn, probe, zeroshot, retrieval", min_length=1)
    train_index: Path | None = Field(None, description="folder of `mlcd index` with the images to learn from")
    test_index: Path = Field(description="folder of `mlcd index` with the held-out images")
    classes: Path | None = Field(None, description="class names by label: a JSON list, or .txt with one a line")
    templates: str = Field("clip_80", description="clip_80, clip_7, or a file: a text a line, {} where the name goes")
    label_key: str = Field("label", description="key of the whole number in the samples' .json; null is no label")
    seed: int = Field(0, ge=0, lt=2**31, description="of the validation splits")
    num_splits: int = Field(5, ge=2, le=100, description="validation splits; the linear probe is their mean")
    batch_size: int = Field(64, ge=1, le=MAX_BATCH, description="images a forward pass, per rank")
    num_threads: int = Field(2, ge=1, le=MAX_THREADS, description="decoding threads of a rank")

    def has(self, protocols: Sequence[Protocol]) -> bool:
        """Whether any of them is asked for."""
        return any(protocol in protocols for protocol in self.protocols)


class EvaluationManifest(Manifest):
    """Manifest of `mlcd evaluate`."""

    report: dict[str, Any]


class Evaluation:
    """One model, on the indexes and by the protocols that the options name. Its methods are collective."""

    def __init__(self, options: Options, context: runner.Context) -> None:
        self.options, self.context, self.ranks = options, context, Ranks(context.group)
        self.names, self.templates = _texts_of(options)
        self.train = _opened(options.train_index, context) if options.has(OF_FEATURES) else None
        self.test = _opened(options.test_index, context)
        if self.train and self.train.manifest.fingerprint == self.test.manifest.fingerprint:
            raise UserError(
                f"--train-index and --test-index are the same images ({options.test_index}): hold some out."
            )
        self.encoder, self.pair = _models(options)
        self.weights = "" if self.encoder is None else self.encoder.fingerprint()
        self.pair_weights = "" if self.pair is None else self.pair.fingerprint()
        self.computing = Computing(context, options.batch_size, options.num_threads, options.overwrite)

    @property
    def name(self) -> str:
        return (self.encoder or self.pair).name  # type: ignore[union-attr]

    def manifest(self) -> EvaluationManifest:
        """As it is to be, without results."""
        options = self.options
        parameters: dict[str, Any] = {"protocols": sorted(set(options.protocols)), "label_key": options.label_key}
        if self.encoder:
            parameters |= {"weights_sha256": self.weights, "pixels": asdict(self.encoder.pixels)}
        if self.pair:
            parameters |= {"pair_weights_sha256": self.pair_weights, "pair_pixels": asdict(self.pair.image.pixels)}
        if options.has(("probe",)):
            parameters |= {"seed": options.seed, "num_splits": options.num_splits}
        if options.has(("zeroshot",)):
            parameters |= {"templates": work_key(self.templates), "classes": work_key(self.names)}
        indexes = {"train_index": self.train, "test_index": self.test}
        return EvaluationManifest(
            stage="evaluate",
            parameters=parameters,
            inputs={role: index.manifest.fingerprint for role, index in indexes.items() if index},
            files={},
            versions=library_versions(),
            report={},
        )

    def of_features(self, encoder: Encoder, train_index: ShardIndex) -> list[Outcome]:
        """kNN and linear probe."""
        options, ranks, device = self.options, self.ranks, self.context.device
        encoder.to(device)
        folder, key = options.out / "features", options.label_key
        rows = [
            self.computing.images(encoder, self.weights, index, folder / split, key, labelled=True)
            for split, index in (("train", train_index), ("test", self.test))
        ]
        torch.set_float32_matmul_precision("highest")  # encoders may take TF32; what is measured with them does not
        train, test = (labelled(part, key, ranks, device) for part in rows)
        num_classes = count_classes(train, test, key)
        checks = [protocol.check for name, protocol in (("knn", knn), ("probe", probe)) if name in options.protocols]
        for check in checks:
            check(train)
        for part in (train, test):
            refuse_not_finite(part.features_nD, ranks, f"{options.model} gives features")
        names = self._names_of(num_classes)
        outcomes = [Outcome({}, f"{train.rows.count} labelled images to learn from, {test.rows.count} held out")]
        if options.has(("knn",)):
            outcomes.append(knn.measure(train, test, num_classes, ranks))
        if options.has(("probe",)):
            outcomes.append(probe.measure(train, test, names, options.seed, options.num_splits, ranks))
        return [*outcomes, Outcome({"num_train": train.rows.count, "num_test": test.rows.count}, "")]

    def of_pairs(self, pair: PairEncoder) -> list[Outcome]:
        """Zero-shot classification and retrieval."""
        options, ranks, device = self.options, self.ranks, self.context.device
        pair.to(device)
        torch.set_float32_matmul_precision("highest")  # towers may take TF32: near classes would change places
        folder, outcomes = options.out / "features", []
        key = options.label_key if options.has(("zeroshot",)) else None
        images = self.computing.images(pair.image, self.pair_weights, self.test, folder / "images", key, labelled=False)
        if options.has(("zeroshot",)):
            assert options.classes is not None, "the options were checked"
            zeroshot.check(images, self.names, options.classes, options.label_key)
        if options.has(("retrieval",)):
            captions = self.computing.captions(pair.text, self.pair_weights, self.test, folder / "captions")
        if options.has(("zeroshot",)):
            outcomes.append(zeroshot.measure(images, pair.text, self.names, self.templates, ranks, device))
        if options.has(("retrieval",)):
            outcomes.append(retrieval.measure(images, captions, ranks, device))
        return outcomes

    def _names_of(self, num_classes: int) -> list[str]:
        """Names to show; numbers where none are given."""
        if self.options.classes is None:
            return [str(label) for label in range(num_classes)]
        if len(self.names) < num_classes:
            raise UserError(f"--classes {self.options.classes} must be a list of at least {num_classes} names.")
        return self.names[:num_classes]


def _opened(folder: Path | None, context: runner.Context) -> ShardIndex:
    assert folder is not None, "the options were checked"
    index = ShardIndex(folder)
    index.check_shards(context.group.rank, context.group.size)
    return index


def _texts_of(options: Options) -> tuple[list[str], list[str]]:
    """Class names and templates. UserError for flags that lack another."""
    if options.has(OF_FEATURES) and options.train_index is None:
        raise UserError("--train-index is missing: knn and probe learn from it. Give it, or name other --protocols.")
    if options.has(("zeroshot",)) and options.classes is None:
        raise UserError("--classes is missing: zeroshot takes a file with the class names, in the order of the labels.")
    names = [] if options.classes is None else read_names(options.classes)
    return names, read_templates(options.templates) if options.has(("zeroshot",)) else []


def _models(options: Options) -> tuple[Encoder | None, PairEncoder | None]:
    """The model as each kind of protocol takes it."""
    specification = options.model if options.weights == "last" else f"{options.weights}:{options.model}"
    encoder = load_encoder(specification) if options.has(OF_FEATURES) else None
    pair = None
    if options.has(OF_PAIRS):
        try:
            pair = load_pair_encoder(specification)
        except UserError as error:
            raise UserError(f"--protocols {' '.join(OF_PAIRS)} need a model with both towers: {error}") from None
    return encoder, pair


def run(options: Options, context: runner.Context) -> None:
    """Compute features, measure and decide over all ranks; rank 0 writes."""
    evaluation = Evaluation(options, context)
    wanted = evaluation.manifest()
    if runner.already_done(options, context, EvaluationManifest, wanted):
        return
    runner.logger.info("evaluate: %s -> %s", evaluation.name, options.out)
    if options.dry_run:
        return
    outcomes: list[Outcome] = []
    if evaluation.encoder and evaluation.train:
        outcomes += evaluation.of_features(evaluation.encoder, evaluation.train)
    if evaluation.pair:
        outcomes += evaluation.of_pairs(evaluation.pair)
    if context.group.is_main:
        write_results(options, evaluation.name, outcomes, wanted)
    context.group.barrier()


def write_results(options: Options, name: str, outcomes: Sequence[Outcome], wanted: EvaluationManifest) -> None:
    """report.json, report.html, confusion.png, CLIP_benchmark's results, and the manifest."""
    report: dict[str, Any] = {"model": name}
    files, sections = {}, []
    for outcome in outcomes:
        report |= outcome.report
        sections += outcome.sections()
        for file, write in outcome.files.items():
            files[file] = write_atomic(options.out / file, write)
        if outcome.task:
            path = f"clip_benchmark/{outcome.task}.json"
            files[path] = write_json(options.out / path, clip_benchmark_result(options, name, outcome))
    files["report.json"] = write_json(options.out / "report.json", report)
    parts = [table({key: value for key, value in report.items() if not isinstance(value, dict | list)})]
    parts += [f"<h2>{key}</h2>{table(report[key])}" for key in OF_PAIRS if key in report]
    content = page(f"Evaluation of {name}", parts, sections).encode()
    files["report.html"] = write_atomic(options.out / "report.html", lambda file: file.write(content))
    write_manifest(options.out, wanted.model_copy(update={"files": files, "report": report}))
    runner.logger.info("evaluate: %s: %s", name, "; ".join(outcome.told for outcome in outcomes if outcome.told))


def clip_benchmark_result(options: Options, name: str, outcome: Outcome) -> dict[str, Any]:
    """One task's result with the keys of CLIP_benchmark, whose `build` makes a table of many."""
    return {
        "dataset": str(options.test_index),
        "model": name,
        "pretrained": options.model,
        "task": outcome.task,
        "metrics": dict(outcome.metrics),
        "language": "en",
    }


def main(argv: list[str] | None = None) -> int:
    """Entry of `mlcd evaluate`."""
    return runner.main("evaluate", Options, run, __doc__, argv)
