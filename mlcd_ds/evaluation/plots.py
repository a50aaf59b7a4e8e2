"""Figures of evaluation results, written as PNG. Matplotlib is imported only when a figure is drawn."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from mlcd_ds.evaluation.linear_probe import ProbeResult

MAX_TOLD = 40  # classes whose names and numbers have room in a figure
_SERIES = (("knn", "kNN", "#9aa5b1"), ("linear_probe", "linear probe", "#2f6690"))


def confusion_plot(result: ProbeResult, class_names: Sequence[str], path: Path | BinaryIO) -> None:
    """Draw the probe's confusion matrix, each row in percent of its true class.

    Raises ValueError unless there is a name for each class.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts_CC = result.confusion_CC.double()
    num_classes = len(counts_CC)
    if len(class_names) != num_classes:
        raise ValueError(f"{len(class_names)} class_names for {num_classes} classes")
    percent = (100 * counts_CC / counts_CC.sum(1, keepdim=True).clamp_min(1)).tolist()
    is_told = num_classes <= MAX_TOLD
    side = 2.5 + 0.5 * min(num_classes, MAX_TOLD)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    if is_told:
        axes.set_xticks(range(num_classes), class_names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(num_classes), class_names)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    num_splits, num_test = result.predictions_SM.shape
    accuracy = f"{result.accuracy:.1%} \u00b1 {result.accuracy_se:.1%}"
    axes.set_title(f"linear probe: {accuracy} of {num_test}, mean of {num_splits} splits")
    for row, values in enumerate(percent if is_told else []):
        for column, value in enumerate(values):
            if value >= 0.5:
                color = "white" if value > 55 else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(image, ax=axes, shrink=0.8, label="% of the true class")
    FigureCanvasAgg(figure).print_png(path)


def comparison_plot(rows: Mapping[str, Mapping[str, float]], path: Path, chance: float) -> None:
    """Draw a bar of kNN and one of linear-probe accuracy for each source of features, first row on top.

    A row has `knn` and `linear_probe`, either or both, and their standard errors as `knn_se` and `linear_probe_se`
    where known (the probe's with the choice of the validation split); all are fractions, as is `chance`, a dashed line.
    Raises ValueError for any other name.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = {name + suffix for name, _, _ in _SERIES for suffix in ("", "_se")}
    for source, row in rows.items():
        if row.keys() - known:
            raise ValueError(f"row {source!r} has {sorted(row.keys() - known)}; known are {sorted(known)}")
    figure = Figure(figsize=(8.0, 1.4 + 0.7 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    thickness = 0.36
    for series, (name, label, color) in enumerate(_SERIES):
        places = [(place, row) for place, row in enumerate(rows.values()) if name in row]
        heights = [place + (series - 0.5) * thickness for place, _ in places]
        accuracies = [100 * row[name] for _, row in places]
        errors = [100 * row.get(f"{name}_se", 0.0) for _, row in places]
        axes.barh(heights, accuracies, thickness, color=color, label=label)
        for height, accuracy, error in zip(heights, accuracies, errors, strict=True):
            if error > 0:
                axes.errorbar(accuracy, height, xerr=error, color="black", capsize=2.5, linewidth=1)
            axes.text(accuracy + error + 1, height, f"{accuracy:.1f}", va="center", fontsize=9)
    axes.axvline(100 * chance, color="#b3413a", linestyle="--", linewidth=1, label=f"chance ({chance:.1%})")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("top-1 accuracy, %  (whiskers: one standard error, of test images and splits)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    FigureCanvasAgg(figure).print_png(path)
