"""The report of a clustering as one HTML file without outside links: tables, plots and pictures are inside."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlcd_ds.artefacts.html_page import Section, data_uri, page, table


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


def cluster_page(figures: dict[str, dict[str, Any]], images: dict[str, bytes], sections: Sequence[Section]) -> str:
    """The whole file: figures by heading, plots, then sections of HTML by heading."""
    parts = [f"<h2>{html.escape(name)}</h2>{table(rows)}" for name, rows in figures.items()]
    parts += [f'<img alt="{html.escape(name)}" src="{data_uri(png, "png")}">' for name, png in images.items()]
    return page("Clusters", parts, sections)
