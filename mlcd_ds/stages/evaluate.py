"""Evaluate a frozen encoder on labelled shards: weighted kNN and a linear probe.

Features are taken before the projection and computed once a shard. The linear probe is CLIP's logistic regression,
its L2 swept on a validation part of the training set, then fitted on all of it: the mean of --num-splits such choices.
Its +- is one standard error, from the test images (bootstrap) and from the choice of the split. kNN is weighted by
exp(cosine / 0.07). Labels are read from the samples' .json members. Writes report.json and confusion.png.

  mlcd evaluate --model runs/demo/export --train-index runs/demo/index/train --test-index runs/demo/index/test \\
      --out runs/demo/evaluation/trained

--model takes what `mlcd embed --encoder` takes: a Hugging Face folder, the folder of a training run (ema:FOLDER or
--weights ema: the moving average of its weights), pixels, recipe:NAME (untrained), efficientnet-lite0. Start it with
torchrun to share the shards over ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from pydantic import Field

from mlcd_ds.artefacts.files import write_array, write_atomic, write_json
from mlcd_ds.artefacts.manifest import Manifest, library_versions, write_manifest
from mlcd_ds.artefacts.readers import read_json
from mlcd_ds.artefacts.typed import MAX_BATCH, MAX_THREADS
from mlcd_ds.data.dali import EvaluationDecoder
from mlcd_ds.data.loader import shard_images
from mlcd_ds.data.sample_labels import shard_labels
from mlcd_ds.data.shard_index import ShardIndex
from mlcd_ds.encoders.base import Encoder
from mlcd_ds.encoders.registry import load_encoder
from mlcd_ds.engine.weights import Weights
from mlcd_ds.errors import UserError
from mlcd_ds.evaluation.knn import usable_ks, weighted_knn
from mlcd_ds.evaluation.linear_probe import ProbeResult, linear_probe
from mlcd_ds.stages import runner
from mlcd_ds.stages.per_shard import ShardNote, for_each_shard, read_shard, work_key

HEADLINE_K = 20


class Options(runner.StageOptions):
    """Options of `mlcd evaluate`."""

    model: str = Field(description="encoder to evaluate, as for `mlcd embed --encoder`")
    weights: Weights = Field("last", description="of a training run: its last, or their average (ema)")
    train_index: Path = Field(description="folder of `mlcd index` with the images to learn from")
    test_index: Path = Field(description="folder of `mlcd index` with the held-out images")
    classes: Path | None = Field(None, description="JSON list of class names, for the plot")
    label_key: str = Field("label", description="key of the whole number in the samples' .json; null is no label")
    seed: int = Field(0, ge=0, lt=2**31, description="of the validation splits")
    num_splits: int = Field(5, ge=2, le=100, description="validation splits; the linear probe is their mean")
    batch_size: int = Field(64, ge=1, le=MAX_BATCH, description="images a forward pass, per rank")
    num_threads: int = Field(2, ge=1, le=MAX_THREADS, description="decoding threads of a rank")


class EvaluationManifest(Manifest):
    """Manifest of `mlcd evaluate`."""

    knn: dict[str, float]
    linear_probe: float


def compute_features(
    encoder: Encoder, index: ShardIndex, folder: Path, options: Options, context: runner.Context, weights: str
) -> dict[str, ShardNote]:
    """Write features fp32 [n, D] and labels int64 [n] of the labelled images of each shard below `folder`.

    Returns the shards' notes: on rank 0 those of all shards.
    """
    decoder = EvaluationDecoder(options.batch_size, encoder.pixels, context.device, options.num_threads)
    numbers = {entry.name: number for number, entry in enumerate(index.shards) if entry.num_images}

    def work(name: str) -> tuple[dict, dict]:
        labels_N = shard_labels(index, numbers[name], options.label_key)
        blocks = []
        with torch.inference_mode():
            for images_B3SS in shard_images(index, numbers[name], decoder):
                blocks.append(encoder.encode(images_B3SS).float().cpu().numpy())
        rows_ND = np.concatenate(blocks)[labels_N >= 0]
        files = {f"{name}.npy": rows_ND, f"{name}.labels.npy": labels_N[labels_N >= 0]}
        return {n: write_array(folder / n, array) for n, array in files.items()}, {}

    key = work_key("evaluate", weights, encoder.pixels, index.manifest.fingerprint, options.label_key)
    keys = dict.fromkeys(numbers, key)
    return for_each_shard(context, folder, keys, work, f"features {folder.name}", options.overwrite)


def read_features(
    index: ShardIndex, folder: Path, notes: Mapping[str, ShardNote], label_key: str, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features fp32 [N, D] and labels int64 [N] of all labelled images, compared with the shards' notes."""
    features = np.concatenate([read_shard(folder, f"{name}.npy", note) for name, note in notes.items()])
    labels = np.concatenate([read_shard(folder, f"{name}.labels.npy", note) for name, note in notes.items()])
    if not len(labels):
        raise UserError(f"{index.folder}: no sample has a label under {label_key!r}. Name another --label-key.")
    return torch.from_numpy(features).to(device), torch.from_numpy(labels).to(device)


def class_names(options: Options, num_classes: int) -> list[str]:
    """Names for the plot; numbers where none are given."""
    if options.classes is None:
        return [str(label) for label in range(num_classes)]
    names = read_json(options.classes, "--classes takes a JSON list of names.")
    if not isinstance(names, list) or len(names) < num_classes:
        raise UserError(f"--classes {options.classes} must be a list of at least {num_classes} names.")
    return [str(name) for name in names]


def run(options: Options, context: runner.Context) -> None:
    """Compute features over all ranks; rank 0 evaluates and writes."""
    train, test = ShardIndex(options.train_index), ShardIndex(options.test_index)
    if train.manifest.fingerprint == test.manifest.fingerprint:
        raise UserError(f"--train-index and --test-index are the same images ({options.test_index}): hold some out.")
    for index in (train, test):
        index.check_shards(context.group.rank, context.group.size)
    encoder = load_encoder(options.model if options.weights == "last" else f"{options.weights}:{options.model}")
    weights = encoder.fingerprint()
    wanted = EvaluationManifest(
        stage="evaluate",
        parameters={
            "weights_sha256": weights,
            "pixels": asdict(encoder.pixels),
            "label_key": options.label_key,
            "seed": options.seed,
            "num_splits": options.num_splits,
        },
        inputs={"train_index": train.manifest.fingerprint, "test_index": test.manifest.fingerprint},
        files={},
        versions=library_versions(),
        knn={},
        linear_probe=0.0,
    )
    if runner.already_done(options, context, EvaluationManifest, wanted):
        return
    runner.logger.info("evaluate: %s -> %s", encoder.name, options.out)
    if options.dry_run:
        return
    encoder.to(context.device)
    features = options.out / "features"
    train_notes, test_notes = (
        compute_features(encoder, index, features / split, options, context, weights)
        for split, index in (("train", train), ("test", test))
    )
    torch.set_float32_matmul_precision("highest")  # encoders may take TF32; what is measured with them does not
    if context.group.is_main:
        key, device = options.label_key, context.device
        train_ND, train_labels_N = read_features(train, features / "train", train_notes, key, device)
        test_MD, test_labels_M = read_features(test, features / "test", test_notes, key, device)
        num_classes = int(train_labels_N.max()) + 1
        num_different = len(train_labels_N.unique())
        if num_classes > max(10_000, 100 * num_different):  # a row of weights each would exhaust memory
            raise UserError(
                f"{options.train_index} has label {num_classes - 1}, but only {num_different} different ones: {key!r} "
                "holds ids, not class numbers. Name another --label-key."
            )
        if int(test_labels_M.max()) >= num_classes:
            raise UserError(f"{options.test_index} has label {int(test_labels_M.max())}, which no training image has.")
        check_measurable(train_ND, train_labels_N, test_MD, options)
        names = class_names(options, num_classes)
        ks = usable_ks(len(train_ND))
        knn = weighted_knn(train_ND, train_labels_N, test_MD, test_labels_M, num_classes, ks)
        generator = torch.Generator().manual_seed(options.seed)
        probe = linear_probe(
            train_ND, train_labels_N, test_MD, test_labels_M, num_classes, generator, options.num_splits
        )
        write_results(options, encoder, knn, probe, len(train_ND), wanted, names)
    context.group.barrier()


def check_measurable(
    train_ND: torch.Tensor, train_labels_N: torch.Tensor, test_MD: torch.Tensor, options: Options
) -> None:
    """UserError where kNN or the probe cannot be computed, before either begins."""
    if not usable_ks(len(train_ND)):
        raise UserError(f"{options.train_index} has {len(train_ND)} labelled images: too few for kNN. Label more.")
    if int(train_labels_N.bincount().max()) < 2:
        raise UserError(f"{options.train_index}: no class has two labelled images, one to validate on. Label more.")
    if not (train_ND.isfinite().all() and test_MD.isfinite().all()):
        raise UserError(f"{options.model} gives features of NaN or infinity: evaluate another checkpoint.")


def write_results(
    options: Options,
    encoder: Encoder,
    knn: dict[int, float],
    probe: ProbeResult,
    num_train: int,
    wanted: EvaluationManifest,
    names: list[str],
) -> None:
    """report.json, confusion.png and the manifest."""
    from mlcd_ds.evaluation.plots import confusion_plot

    headline = knn.get(HEADLINE_K, knn[min(knn)])
    report = {
        "model": encoder.name,
        "knn": headline,
        "knn_by_k": knn,
        "linear_probe": probe.accuracy,
        "linear_probe_se": probe.accuracy_se,
        "linear_probe_test_se": probe.test_se,
        "linear_probe_split_sd": probe.split_sd,
        "linear_probe_mean_per_class": probe.mean_per_class,
        "linear_probe_by_split": [{"l2": split.l2, "accuracy": split.accuracy} for split in probe.splits],
        "converged": probe.num_unconverged == 0,
        "num_train": num_train,
        "num_test": probe.predictions_SM.shape[1],
    }
    if probe.num_unconverged:
        runner.logger.warning(
            "evaluate: %d of %d fits of the linear probe did not converge: its accuracy is of unfinished fits.",
            probe.num_unconverged,
            probe.num_fits,
        )
    files = {"report.json": write_json(options.out / "report.json", report)}
    shown = names[: len(probe.per_class_accuracy)]
    files["confusion.png"] = write_atomic(options.out / "confusion.png", lambda f: confusion_plot(probe, shown, f))
    scores = {"knn": {str(k): accuracy for k, accuracy in knn.items()}, "linear_probe": probe.accuracy}
    write_manifest(options.out, wanted.model_copy(update={"files": files, **scores}))
    runner.logger.info(
        "evaluate: %s: kNN %.1f%%, linear probe %.1f%% +- %.1f (%d test images, %d validation splits)",
        encoder.name,
        100 * headline,
        100 * probe.accuracy,
        100 * probe.accuracy_se,
        report["num_test"],
        len(probe.splits),
    )


def main(argv: list[str] | None = None) -> int:
    """Entry of `mlcd evaluate`."""
    return runner.main("evaluate", Options, run, __doc__, argv)
