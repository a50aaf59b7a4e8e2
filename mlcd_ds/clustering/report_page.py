"""The report of a clustering as one HTML file without outside links: tables, plots and pictures are inside."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

THUMBNAIL, QUALITY = 96, 80
STYLE = (
    "body{font:15px sans-serif;margin:2em auto;max-width:72em;color:#222}table{border-collapse:collapse;margin:1em 0}"
    "td{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:right}td:first-child{text-align:left}"
    "img{margin:2px;vertical-align:middle}p.row{margin:.2em 0}"
)


def data_uri(content: bytes, kind: str) -> str:
    """A file's content as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def thumbnail(encoded: bytes) -> str:
    """A small JPEG of an image, as a data URI; a grey one where Pillow cannot decode what DALI can."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
    except Exception:  # Pillow raises many kinds
        image = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "grey")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return data_uri(buffer.getvalue(), "jpeg")


def plot(draw: Callable[[Any], None], title: str, x: str, y: str) -> bytes:
    """A PNG of what `draw(axes)` draws."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def plots(sizes_C: np.ndarray, objective: Sequence[float], similarity_P: Sequence[float]) -> dict[str, bytes]:
    """PNGs of cluster sizes, the objective by iteration, and the similarity by rank of a label."""
    bins = np.unique(np.geomspace(1, max(2, sizes_C.max() + 1), 40).astype(int))

    def sizes(axes: Any) -> None:
        axes.hist(sizes_C[sizes_C > 0], bins=bins)
        axes.set_xscale("log")

    return {
        "sizes": plot(sizes, "images of a cluster (nearest centre)", "images", "clusters"),
        "objective": plot(
            lambda axes: axes.plot(range(1, len(objective) + 1), objective, marker="."),
            "objective (samples first, then all images)",
            "iteration",
            "mean",
        ),
        "similarity": plot(
            lambda axes: axes.plot(range(1, len(similarity_P) + 1), similarity_P, marker="."),
            "mean similarity of an image to its labels",
            "label",
            "similarity",
        ),
    }


def table(rows: dict[str, Any]) -> str:
    """A line a figure."""

    def text(value: Any) -> str:
        return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

    lines = (
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(text(value))}</td></tr>" for name, value in rows.items()
    )
    return f"<table>{''.join(lines)}</table>"


def pictures(caption: str, uris: Sequence[str]) -> str:
    """A line of thumbnails."""
    return f"<p class=row>{html.escape(caption)}</p><p>{''.join(f'<img src={chr(34)}{u}{chr(34)}>' for u in uris)}</p>"


def page(figures: dict[str, dict[str, Any]], images: dict[str, bytes], sections: Sequence[tuple[str, str]]) -> str:
    """The whole file: figures by heading, plots, then sections of HTML by heading."""
    parts = [f"<!doctype html><meta charset=utf-8><title>Clusters</title><style>{STYLE}</style><h1>Clusters</h1>"]
    parts += [f"<h2>{html.escape(name)}</h2>{table(rows)}" for name, rows in figures.items()]
    parts += [f'<img alt="{html.escape(name)}" src="{data_uri(png, "png")}">' for name, png in images.items()]
    parts += [f"<h2>{html.escape(name)}</h2>{body}" for name, body in sections]
    return "\n".join(parts) + "\n"
