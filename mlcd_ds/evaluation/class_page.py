"""What a classifier takes for what, as parts of an HTML page: confusion, best and worst classes, which images to show.

C classes, M test images.
"""

from __future__ import annotations

import html
import io
from collections.abc import Sequence

import torch
from torch import Tensor

from mlcd_ds.artefacts.html_page import Section, data_uri, grid
from mlcd_ds.evaluation.accuracy import per_class_accuracy

MAX_TABLE = 30  # classes; of more the confusion is a picture
SHOWN = 10


def percent(share: float) -> str:
    """12.3 %, or a dash where there is nothing to share."""
    return "-" if share != share else f"{100 * share:.1f} %"


def class_sections(confusion_CC: Tensor, names: Sequence[str], num_times: int = 1) -> list[Section]:
    """Best and worst classes, the most frequent confusions, and the confusion of all; row true, column taken for.

    Each image was counted `num_times`.
    """
    recall_C, of_class_C = per_class_accuracy(confusion_CC), confusion_CC.sum(1)
    order = [c for c in recall_C.argsort(descending=True, stable=True).tolist() if of_class_C[c]]
    best, worst = order[:SHOWN], order[::-1][:SHOWN]

    def lines(classes: Sequence[int]) -> str:
        rows = [
            [
                names[c],
                f"{int(of_class_C[c]) // num_times:,}",
                percent(float(recall_C[c])),
                _taken_for(confusion_CC[c], c, names),
            ]
            for c in classes
        ]
        return grid(rows, ["class", "images", "right", "most often taken for"])

    return [
        ("Best classes", lines(best)),
        ("Worst classes", lines(worst)),
        ("Most frequent confusions", _pairs(confusion_CC, names, num_times)),
        ("Confusion: a row is the true class, a column what it is taken for", _confusion(confusion_CC, names)),
    ]


def _taken_for(counts_C: Tensor, label: int, names: Sequence[str]) -> str:
    wrong_C = counts_C.clone()
    wrong_C[label] = 0
    count, other = wrong_C.max(0)
    return f"{names[int(other)]} ({percent(float(count) / float(counts_C.sum()))})" if count else "-"


def _pairs(confusion_CC: Tensor, names: Sequence[str], num_times: int) -> str:
    wrong_CC = confusion_CC.clone().fill_diagonal_(0)
    counts, places = wrong_CC.flatten().sort(descending=True, stable=True)
    pairs = [(int(n), *divmod(int(p), len(names))) for n, p in zip(counts[:SHOWN], places[:SHOWN], strict=True) if n]
    return grid(
        [[names[a], names[b], f"{count / num_times:,.4g}"] for count, a, b in pairs], ["class", "taken for", "images"]
    )


def _confusion(confusion_CC: Tensor, names: Sequence[str]) -> str:
    share_CC = confusion_CC.double() / confusion_CC.sum(1, keepdim=True).clamp_min(1)
    if len(names) > MAX_TABLE:
        return f'<img alt="confusion" src="{_picture(share_CC)}">'
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    lines = [f"<tr><th></th>{head}</tr>"]
    for name, shares in zip(names, share_CC.tolist(), strict=True):
        cells = "".join(
            f'<td style="background:rgba(47,102,144,{share:.2f})">{100 * share:.0f}</td>' if share else "<td></td>"
            for share in shares
        )
        lines.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
    return f"<p>in % of the true class</p><table>{''.join(lines)}</table>"


def _picture(share_CC: Tensor) -> str:
    """A pixel or more a cell, the darker the more; square roots show what is rare."""
    from PIL import Image

    gray = (255 * (1 - share_CC.sqrt())).round().to(torch.uint8)
    scale = max(1, 600 // len(gray))
    image = Image.fromarray(gray.numpy()).resize((scale * len(gray), scale * len(gray)), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return data_uri(buffer.getvalue(), "png")


def answers(true_n: Sequence[int], taken_n: Sequence[int], names: Sequence[str]) -> list[str]:
    """For each image its class, and what it is taken for where that is another."""
    pairs = [(names[true], names[taken]) for true, taken in zip(true_n, taken_n, strict=True)]
    return [true if true == taken else f"{true}, taken for {taken}" for true, taken in pairs]


def under(protocol: str, sections: Sequence[Section]) -> list[Section]:
    """The sections with the protocol's name before their headings."""
    return [(f"{protocol}: {heading[0].lower()}{heading[1:]}", body) for heading, body in sections]


def spread(is_shown_M: Tensor, count: int = SHOWN) -> list[int]:
    """Numbers of `count` of the images that are asked for (bool [M]), evenly from the first to the last."""
    numbers = is_shown_M.nonzero()[:, 0].tolist()
    if len(numbers) <= count:
        return numbers
    return [numbers[place * (len(numbers) - 1) // (count - 1)] for place in range(count)]
