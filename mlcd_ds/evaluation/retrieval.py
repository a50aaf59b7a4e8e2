"""Retrieval among images and their captions, both ways: is a right one among the first k?

Query q retrieves the gallery in the order of <unit(q), unit(g)>; equal similarities stand in the gallery's order. The
place of a query is the number of gallery items before the first that belongs to it, and recall at k the share of
queries whose place is below k. A caption belongs to its one image, an image to all of its captions: any of them is a
hit. Places are counted in strips of queries; no matrix of all pairs is held.

Shapes: q queries on this rank, Q on all; G gallery; b rows of a strip; E embedding. N images, T captions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mlcd_ds.evaluation.ranks import ALONE, Ranks

KS = (1, 5, 10)
_SIMILARITIES_A_STRIP = 2**24  # 64 MiB


def places(
    queries_qE: Tensor, owners_q: Tensor, gallery_GE: Tensor, owners_G: Tensor, strip: int = _SIMILARITIES_A_STRIP
) -> Tensor:
    """int64 [q]: the place of each query. Items and queries of the same owner (an image's number) belong together.

    All embeddings are of unit length. About `strip` similarities are held at a time. Raises ValueError for a query to
    which nothing belongs.
    """
    order_G = torch.arange(len(gallery_GE), device=gallery_GE.device)
    found = []
    rows = max(1, strip // max(1, len(gallery_GE)))
    for rows_bE, owners_b in zip(queries_qE.split(rows), owners_q.split(rows), strict=True):
        similarity_bG = rows_bE @ gallery_GE.T
        is_own_bG = owners_b[:, None] == owners_G
        best_b1, first_b1 = similarity_bG.masked_fill(~is_own_bG, -torch.inf).max(dim=1, keepdim=True)
        if bool(best_b1.isinf().any()):
            raise ValueError("a query has nothing in the gallery that belongs to it")
        is_before_bG = (similarity_bG > best_b1) | ((similarity_bG == best_b1) & (order_G < first_b1))
        found.append(is_before_bG.sum(1))
    return torch.cat(found)


@dataclass(frozen=True, eq=False)
class RetrievalResult:
    """Places of the captions that retrieve images, and of the images that retrieve captions."""

    images_of_text_T: Tensor
    texts_of_image_N: Tensor

    def report(self) -> dict[str, float | int]:
        """Entries of report.json, named as CLIP_benchmark does: image retrieval is from a caption to its image."""
        named = (("image", self.images_of_text_T), ("text", self.texts_of_image_N))
        recalls = {
            f"{name}_retrieval_recall@{k}": int((place < k).sum()) / len(place) for name, place in named for k in KS
        }
        return {**recalls, "num_images": len(self.texts_of_image_N), "num_texts": len(self.images_of_text_T)}


def retrieval(images_NE: Tensor, texts_TE: Tensor, image_of_text_T: Tensor, ranks: Ranks = ALONE) -> RetrievalResult:
    """Retrieve both ways; all embeddings (of any length) are on every rank, the queries are dealt over `ranks`.

    `image_of_text_T` has the number of each caption's image. Raises ValueError where an image has none, and for
    embeddings that are not finite. Collectives: all-gathers of [N] and [T].
    """
    images_NE, texts_TE = F.normalize(images_NE.float(), dim=1), F.normalize(texts_TE.float(), dim=1)
    numbers_N = torch.arange(len(images_NE), device=images_NE.device)
    if not torch.equal(image_of_text_T.unique(), numbers_N):
        raise ValueError(f"captions must belong to images 0 to {len(images_NE) - 1}, each at least one")
    if not (images_NE.isfinite().all() and texts_TE.isfinite().all()):
        raise ValueError("embeddings of NaN or infinity")  # which would be before no other, and so a hit
    own_t, own_n = ranks.share(len(texts_TE)), ranks.share(len(images_NE))
    by_text = places(texts_TE[own_t], image_of_text_T[own_t], images_NE, numbers_N)
    by_image = places(images_NE[own_n], numbers_N[own_n], texts_TE, image_of_text_T)
    return RetrievalResult(ranks.concat(by_text), ranks.concat(by_image))
