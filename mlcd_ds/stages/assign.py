"""Label every image with its nearest centres: the labels of MLCD (paper, 3.2; eight an image).

Writes beside the shards, which stay as they are, a file each: `NAME.npy`, int32 [n, P], nearest first, in index order;
`similarity/NAME.npy`, fp16 [n, P], the cosine to each (or minus the squared distance, where the clusters are
euclidean); and `sizes.npy`, int64 [C], for each centre the number of images whose nearest it is.

  mlcd assign --embeddings runs/laion/embeddings --clusters runs/laion/clusters --out runs/laion/labels

`report.html` and `report.json` beside them show sizes and similarities, and so does TensorBoard.

With --threshold an image keeps the centres that are at least that similar, its nearest in any case, and at most
--num-labels; the rest is -1. The paper compares this with a fixed number of labels. The next stage is `mlcd train`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from pydantic import Field

from mlcd_ds.artefacts.files import write_array
from mlcd_ds.artefacts.manifest import library_versions, read_manifest, write_manifest
from mlcd_ds.clustering.assigner import AssignerName, Precision
from mlcd_ds.clustering.center_store import CenterStore
from mlcd_ds.clustering.choose_assigner import choose_assigner, describe_assigner, resolve_precision
from mlcd_ds.clustering.embedding_store import EmbeddingManifest, embedding_rows
from mlcd_ds.clustering.label_pass import label_rows
from mlcd_ds.data.label_store import LabelManifest, check_labels
from mlcd_ds.errors import UserError
from mlcd_ds.stages import runner
from mlcd_ds.stages.assign_report import open_index, write_report
from mlcd_ds.stages.per_shard import REDO, for_each_shard, read_shard, work_key


class Options(runner.StageOptions):
    """Options of `mlcd assign`."""

    embeddings: Path = Field(description="folder of `mlcd embed`")
    clusters: Path = Field(description="folder of `mlcd cluster`")
    num_labels: int = Field(8, ge=1, description="labels an image (the paper's best: 8)")
    threshold: float | None = Field(None, description="least similarity of a label after the first; default: none")
    assigner: AssignerName = Field("auto", description="what finds the nearest centres")
    index: Path | None = Field(
        None,
        description="folder of `mlcd index`: the report then shows images, and classes, for which it reads every .json",
    )
    label_key: str = Field("label", description="key of the class in the samples' .json, for the report")
    precision: Precision = Field("auto", description="of the products; auto is bf16 where that is fast and work large")


def run(options: Options, context: runner.Context) -> None:
    """Label all shards over all ranks; rank 0 writes the manifest."""
    group = context.group
    embeddings = read_manifest(options.embeddings, EmbeddingManifest, "embed")
    store = CenterStore(options.clusters)
    clusters = store.manifest
    if clusters.dim != embeddings.dim:
        raise UserError(
            f"{options.clusters} has centres of dimension {clusters.dim}, {options.embeddings} embeddings of "
            f"{embeddings.dim}: they are of different encoders. Cluster these embeddings, or embed with that encoder."
        )
    if options.num_labels > clusters.num_centers:
        raise UserError(f"--num-labels {options.num_labels} is more than the {clusters.num_centers} centres.")
    threshold = {} if options.threshold is None else {"threshold": options.threshold}
    wanted = LabelManifest(
        stage="assign",
        parameters={"num_labels": options.num_labels, **threshold},
        inputs={
            "index": embeddings.inputs["index"],
            "embeddings": embeddings.fingerprint,
            "clusters": clusters.fingerprint,
        },
        files={},
        versions=library_versions(),
        num_images=embeddings.num_images,
        num_labels=options.num_labels,
        num_centers=clusters.num_centers,
    )
    if runner.already_done(options, context, LabelManifest, wanted):
        return
    index = None if options.index is None else open_index(options.index, embeddings.inputs["index"])
    is_bf16 = resolve_precision(
        options.precision, context.device, embeddings.num_images * clusters.num_centers * clusters.dim
    )
    searcher = describe_assigner(options.assigner, context.device, is_bf16)
    shape = (embeddings.num_images, options.num_labels)
    runner.logger.info("assign: %d images x %d labels by %s -> %s", *shape, searcher, options.out)
    assigner = choose_assigner(options.assigner, clusters.metric, context.device, is_bf16)
    if options.dry_run:
        return
    assigner.set_centers(torch.from_numpy(np.array(store.centers_CE)))

    counts = dict(embeddings.shards)

    def work(name: str) -> tuple[dict, dict]:
        rows_NE = torch.from_numpy(embedding_rows(options.embeddings, embeddings, name, counts[name]))
        if len(bad := torch.nonzero(~rows_NE.isfinite().all(dim=1))):
            raise UserError(
                f"{options.embeddings / name}.npy row {int(bad[0])} has NaN or infinity. Make the embeddings again: "
                f"`mlcd embed --overwrite --out {options.embeddings}`."
            )
        labels_NP, similarity_NP = label_rows(
            assigner, rows_NE, options.num_labels, clusters.metric, options.threshold, context.device
        )
        arrays = {f"similarity/{name}.npy": similarity_NP, f"{name}.npy": labels_NP}
        return {file: write_array(options.out / file, array) for file, array in arrays.items()}, {}

    key = work_key("assign", wanted.parameters, wanted.inputs)
    names = list(counts)
    notes = for_each_shard(context, options.out, dict.fromkeys(names, key), work, "assign", redo=options.overwrite)
    sizes_C = torch.zeros(clusters.num_centers, dtype=torch.int64)
    num_labels = torch.zeros(1, dtype=torch.int64)
    for name in context.mine(names):
        labels_NP = read_shard(options.out, f"{name}.npy", notes[name])
        check_labels(labels_NP, clusters.num_centers, options.out / f"{name}.npy", REDO)
        num_labels += int((labels_NP >= 0).sum())
        sizes_C += torch.bincount(torch.from_numpy(labels_NP[:, 0].astype(np.int64)), minlength=clusters.num_centers)
    group.all_reduce_sum(sizes_C)
    group.all_reduce_sum(num_labels)
    if group.is_main:
        files = {name: record for note in notes.values() for name, record in note.files.items()}
        files["sizes.npy"] = write_array(options.out / "sizes.npy", sizes_C.numpy())
    group.barrier()
    write_report(context, options.out, notes, sizes_C.numpy(), wanted, clusters, index, options.label_key)
    if group.is_main:
        write_manifest(options.out, wanted.model_copy(update={"files": files}))
        low, middle, high = np.percentile(sizes_C.numpy(), (5, 50, 95))
        runner.logger.info(
            "assign: %.2f labels an image; images a centre: %d empty, 5%% have %d or fewer, median %d, 95%% have %d or "
            "fewer, largest %d",
            float(num_labels) / max(1, embeddings.num_images),
            int((sizes_C == 0).sum()),
            low,
            middle,
            high,
            int(sizes_C.max()),
        )
    group.barrier()


def main(argv: list[str] | None = None) -> int:
    """Entry of `mlcd assign`."""
    return runner.main("assign", Options, run, __doc__, argv)
