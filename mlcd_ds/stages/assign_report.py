"""The report that `mlcd assign` leaves beside its labels: figures, plots and pictures. Collective over all ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from mlcd_ds.artefacts.files import write_atomic, write_json
from mlcd_ds.artefacts.html_page import pictures, thumbnail
from mlcd_ds.clustering.center_store import ClusterManifest
from mlcd_ds.clustering.report import Extremes, agreement, size_figures
from mlcd_ds.clustering.report_page import cluster_page, plots
from mlcd_ds.data.label_store import LabelManifest
from mlcd_ds.data.sample_labels import shard_labels
from mlcd_ds.data.shard_index import ShardIndex, ShardReader
from mlcd_ds.errors import UserError
from mlcd_ds.stages.per_shard import ShardNote, read_shard
from mlcd_ds.stages.runner import Context

REPORT_NAME, PAGE_NAME = "report.json", "report.html"
CLUSTERS_SHOWN, MEMBERS_SHOWN, IMAGES_SHOWN = 8, 8, 6


def open_index(folder: Path, fingerprint: str) -> ShardIndex:
    """The index that the embeddings were made from. UserError when it is another."""
    index = ShardIndex(folder)
    if index.manifest.fingerprint != fingerprint:
        raise UserError(f"--index {folder} is not the index that these embeddings were made from.")
    return index


def shown_clusters(sizes_C: np.ndarray) -> list[int]:
    """Some clusters from the largest to the smallest that is not empty."""
    order = np.argsort(-sizes_C, kind="stable")[: int((sizes_C > 0).sum())]
    return [int(order[place]) for place in np.unique(np.linspace(0, len(order) - 1, CLUSTERS_SHOWN).astype(int))]


def write_report(
    context: Context,
    out: Path,
    notes: Mapping[str, ShardNote],
    sizes_C: np.ndarray,
    labels: LabelManifest,
    clusters: ClusterManifest,
    index: ShardIndex | None,
    label_key: str,
) -> None:
    """Read the labels of all shards once more; rank 0 writes report.json, report.html and TensorBoard's events.

    `notes` are those of all shards on rank 0, of a rank's own elsewhere. With an index there are pictures, and, where
    samples have classes under `label_key`, purity and NMI.
    """
    group = context.group
    extremes = Extremes(shown_clusters(sizes_C), MEMBERS_SHOWN)
    sums_2P = torch.zeros(2, labels.num_labels, dtype=torch.float64)
    members, classes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    number_of = {} if index is None else {entry.name: i for i, entry in enumerate(index.shards)}
    for name in context.mine(list(notes)) if group.is_main else notes:
        labels_NP = read_shard(out, f"{name}.npy", notes[name])
        similarity_NP = read_shard(out, f"similarity/{name}.npy", notes[name]).astype(np.float64)
        is_label_NP = labels_NP >= 0
        sums_2P[0] += torch.from_numpy(np.where(is_label_NP, similarity_NP, 0).sum(axis=0))
        sums_2P[1] += torch.from_numpy(is_label_NP.sum(axis=0))
        if index is not None:
            extremes.see(number_of[name], labels_NP[:, 0], similarity_NP[:, 0])
            classes_N = shard_labels(index, number_of[name], label_key)
            members.append(labels_NP[classes_N >= 0, 0].astype(np.int64))
            classes.append(classes_N[classes_N >= 0])
    group.all_reduce_sum(sums_2P)
    everyone = group.gather_objects((extremes.members, np.concatenate(members), np.concatenate(classes)))
    if not group.is_main:
        return
    similarity_P = (sums_2P[0] / sums_2P[1].clamp_min(1)).tolist()
    figures = {
        "sizes": size_figures(sizes_C),
        "similarity to the labels": {f"label {number}": value for number, value in enumerate(similarity_P, 1)},
        "iterations": {
            "iterations": len(clusters.objective),
            "first objective": clusters.objective[0],
            "last objective": clusters.objective[-1],
            "near copies left out": clusters.num_duplicates,
        },
    }
    members_N, classes_N = (np.concatenate([part[i] for part in everyone]) for i in (1, 2))
    if len(members_N):
        figures["agreement with the classes"] = agreement(members_N, classes_N)
    for found, _, _ in everyone:
        for cluster, some in found.items():
            extremes.add(cluster, some)
    sections = [] if index is None else _pictures(out, notes, index, extremes, sizes_C)
    images = plots(sizes_C, clusters.objective, similarity_P)
    write_json(out / REPORT_NAME, {**figures, "objective": list(clusters.objective)})
    content = cluster_page(figures, images, sections).encode()
    write_atomic(out / PAGE_NAME, lambda file: file.write(content))
    _write_events(out, sizes_C, clusters.objective, figures)


def _pictures(
    out: Path, notes: Mapping[str, ShardNote], index: ShardIndex, extremes: Extremes, sizes_C: np.ndarray
) -> list[tuple[str, str]]:
    """For some clusters their nearest and farthest members, and some images with the nearest member of each label."""
    reader = ShardReader(index)

    def shown(members: Sequence[tuple[float, int, int]]) -> list[str]:
        return [thumbnail(reader.read(shard, index.samples(shard).image, row)) for _, shard, row in members]

    lines = []
    for cluster, members in extremes.members.items():
        half = min(MEMBERS_SHOWN, -(-len(members) // 2))
        title = f"cluster {cluster}, {int(sizes_C[cluster]):,} images: nearest"
        lines.append(pictures(title, shown(members[:half])) + pictures("farthest", shown(members[half:])))
    sections = [("Clusters from large to small", "".join(lines))]
    seen = [members[0] for members in extremes.members.values()][:IMAGES_SHOWN]
    lines = []
    for _, shard, row in seen:
        name = index.shards[shard].name
        labels_NP = read_shard(out, f"{name}.npy", notes[name])
        labels_P, similarity_P = labels_NP[row], read_shard(out, f"similarity/{name}.npy", notes[name])[row]
        of_label = [_another_member(labels_NP, shard, int(label)) for label in labels_P if label >= 0]
        text = ", ".join(f"{label} ({s:.2f})" for label, s in zip(labels_P, similarity_P, strict=True) if label >= 0)
        lines.append(pictures(f"an image, then a member of each of its clusters {text}", shown([(0.0, shard, row)])))
        lines.append(pictures("", shown([member for member in of_label if member is not None])))
    reader.close()
    return [*sections, ("Images and their clusters", "".join(lines))]


def _another_member(labels_NP: np.ndarray, shard: int, label: int) -> tuple[float, int, int] | None:
    """For a label: the first image of the same shard that has it as its nearest centre."""
    rows = np.flatnonzero(labels_NP[:, 0] == label)
    return (0.0, shard, int(rows[0])) if len(rows) else None


def _write_events(out: Path, sizes_C: np.ndarray, objective: Sequence[float], figures: dict) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(out / "tensorboard")) as writer:
        for iteration, value in enumerate(objective, 1):
            writer.add_scalar("clusters/objective", value, iteration)
        for name, value in figures["sizes"].items():
            writer.add_scalar(f"clusters/{name}", value, 0)
        for number, value in enumerate(figures["similarity to the labels"].values(), 1):
            writer.add_scalar("clusters/similarity_by_label", value, number)
        writer.add_histogram("clusters/images_per_center", sizes_C, 0)
        writer.add_text("clusters/report", f"```json\n{json.dumps(figures, indent=1)}\n```")
