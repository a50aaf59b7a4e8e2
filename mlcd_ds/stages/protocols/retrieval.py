"""Retrieval among the test images and their captions, both ways."""

from __future__ import annotations

import html

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mlcd_ds.artefacts.html_page import Section, captioned, pictures
from mlcd_ds.data.captions import caption_lines
from mlcd_ds.data.shard_index import ShardReader
from mlcd_ds.evaluation.ranks import Ranks
from mlcd_ds.evaluation.retrieval import RetrievalResult, retrieval
from mlcd_ds.stages.protocols.base import Outcome
from mlcd_ds.stages.protocols.rows import Rows, refuse_not_finite

QUERIES_SHOWN, FOUND_SHOWN = 6, 5


def measure(images: Rows, captions: Rows, ranks: Ranks, device: torch.device) -> Outcome:
    """Recall at 1, 5 and 10 both ways. Every rank holds the embeddings of all images and captions."""
    images_NE, texts_TE = (ranks.concat(rows.own("", ranks, device)) for rows in (images, captions))
    for rows in (images_NE, texts_TE):
        refuse_not_finite(rows, ranks, "the model gives embeddings")
    image_of_text_T = torch.from_numpy(_images_of(captions)).to(device)
    result = retrieval(images_NE, texts_TE, image_of_text_T, ranks)
    report = result.report()
    recalls = {name: value for name, value in report.items() if "@" in name}
    told = ", ".join(f"{way} R@1 {report[f'{way}_retrieval_recall@1']:.1%}" for way in ("image", "text"))
    return Outcome(
        report={"retrieval": report},
        told=f"retrieval: {told} ({report['num_images']} images, {report['num_texts']} captions)",
        task="zeroshot_retrieval",
        metrics=recalls,
        sections=lambda: _sections(images, captions, images_NE, texts_TE, image_of_text_T, result),
    )


def _images_of(captions: Rows) -> np.ndarray:
    """int64 [T]: the number of each caption's image, counted over the shards in the order of the index."""
    first, parts, begin = 0, [], 0
    rows_T = captions.all("rows")
    counts = {entry.name: entry.num_images for entry in captions.index.shards}
    for name, note in captions.notes.items():
        parts.append(rows_T[begin : begin + note.summary["num_rows"]] + first)
        begin += note.summary["num_rows"]
        first += counts[name]
    return np.concatenate(parts)


def _sections(
    images: Rows,
    captions: Rows,
    images_NE: Tensor,
    texts_TE: Tensor,
    image_of_text_T: Tensor,
    result: RetrievalResult,
) -> list[Section]:
    """Some queries of each kind with the first that they find; right ones are told."""
    owners_T = image_of_text_T.cpu()

    def first_found(queries_qE: Tensor, gallery_GE: Tensor) -> list[list[int]]:
        similarity_qG = F.normalize(queries_qE, dim=1) @ F.normalize(gallery_GE, dim=1).T
        return similarity_qG.topk(min(FOUND_SHOWN, len(gallery_GE)), dim=1).indices.tolist()

    def some(count: int) -> list[int]:
        return sorted(set(np.linspace(0, count - 1, QUERIES_SHOWN).astype(int).tolist()))

    lines = []
    queries = some(len(texts_TE))
    for query, found in zip(queries, first_found(texts_TE[queries], images_NE), strict=True):
        place, own = int(result.images_of_text_T[query]), int(owners_T[query])
        shown = [f"{number + 1}{' (its own)' if image == own else ''}" for number, image in enumerate(found)]
        thumbnails = images.thumbnails([own, *found])
        title = f"{_text(captions, owners_T, query)!r}: its own image is number {place + 1}"
        lines.append(f"<p class=row>{html.escape(title)}</p>{captioned(thumbnails, ['its own', *shown])}")
    sections = [("Image retrieval: captions and the images that they find", "".join(lines))]
    lines = []
    queries = some(len(images_NE))
    for query, found in zip(queries, first_found(images_NE[queries], texts_TE), strict=True):
        texts = [f"{_text(captions, owners_T, t)}{' (its own)' if owners_T[t] == query else ''}" for t in found]
        place = int(result.texts_of_image_N[query])
        lines.append(pictures(f"its first own caption is number {place + 1}", images.thumbnails([query])))
        lines.append("<ol>" + "".join(f"<li>{html.escape(text)}</li>" for text in texts) + "</ol>")
    return [*sections, ("Text retrieval: images and the captions that they find", "".join(lines))]


def _text(captions: Rows, owners_T: Tensor, number: int) -> str:
    """A caption's text, from its shard; those of an image follow each other."""
    ((shard, row),) = captions.samples([number])
    reader = ShardReader(captions.index)
    lines = caption_lines(reader.read(shard, captions.index.samples(shard).caption, row))
    reader.close()
    return lines[number - int(torch.searchsorted(owners_T, owners_T[number]))]
