"""The tables and plots of docs/comparison.md, from the records of `make compare`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from compare_systems import ABLATIONS, LEARNING_RATES, SEEDS, SYSTEMS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "comparison.md"
BEGIN, END = "<!-- written by make compare: begin -->", "<!-- written by make compare: end -->"
COLUMNS = {"linear_probe": "linear probe", "knn": "kNN", "zeroshot": "zero-shot"}
COLUMNS |= {name: name for name in ("image -> text R@10", "text -> image R@10")}
Scores = dict[str, list[float]]  # of each measure, one a seed


def scores_of(records: Path, names: Sequence[str]) -> Scores:
    """Of the runs that there are."""
    found: Scores = {}
    for name in names:
        path = records / f"{name}.json"
        for key, value in json.loads(path.read_text())["scores"].items() if path.exists() else ():
            found.setdefault(key, []).append(value)
    return found


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """In percent; the error is the standard error of the mean over seeds, 0 where there is one."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return 100 * statistics.mean(values), 100 * error


def shown(values: Sequence[float] | None) -> str:
    """Mean and error, as a table has them."""
    if not values:
        return "-"
    mean, error = mean_and_error(values)
    return f"{mean:.1f} ± {error:.1f}" if len(values) > 1 else f"{mean:.1f}"


def table(title: str, rows: Mapping[str, Scores], columns: Mapping[str, str]) -> list[str]:
    """In Markdown."""
    lines = [f"| {title} | {' | '.join(columns.values())} | seeds |", f"|---|{'---:|' * (len(columns) + 1)}"]
    for name, scores in rows.items():
        count = max((len(values) for values in scores.values()), default=0)
        cells = [shown(scores.get(key)) for key in columns]
        lines.append(f"| {name} | {' | '.join(cells)} | {count} |")
    return lines


def ablation_scores(records: Path, key: str) -> dict[str, Scores]:
    """By value."""
    found, ablation = {}, ABLATIONS[key]
    for value in ablation.values:
        middle = "" if value == ablation.default else f"-{key}{value:g}"
        found[f"{value:g}"] = scores_of(records, [f"mlcd{middle}-seed{seed}" for seed in SEEDS])
    return found


def write_page(records: Path) -> None:
    """Draw the plots beside the records' folder, and replace what is between the marks in the page."""
    systems = {system.title: scores_of(records, [f"{n}-seed{s}" for s in SEEDS]) for n, system in SYSTEMS.items()}
    lines = [
        *table("system", systems, COLUMNS),
        "",
        "![systems](comparison/systems.png)",
        "",
        "Learning rates tried",
        "",
    ]
    lines += _rates_table(records)
    for key, ablation in ABLATIONS.items():
        scores = ablation_scores(records, key)
        columns = {name: COLUMNS[name] for name in ("linear_probe", "knn")}
        lines += ["", *table(ablation.title, scores, columns)]
    lines += ["", "![ablations](comparison/ablations.png)"]
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text("\n".join([f"{before}{BEGIN}", *lines, f"{END}{rest.partition(END)[2]}"]))
    draw_systems(systems, records.parent / "systems.png")
    draw_ablations(records, records.parent / "ablations.png")


def _rates_table(records: Path) -> list[str]:
    """Scores of the tries on the pictures left out of training: the mean of kNN and probe, or zero-shot."""
    lines = [f"| system | {' | '.join(f'{lr:g}' for lr in LEARNING_RATES)} |", f"|---|{'---:|' * len(LEARNING_RATES)}"]
    for name, system in SYSTEMS.items():
        cells = []
        for lr in LEARNING_RATES:
            scores = scores_of(records, [f"tuning-{name}-lr{lr:g}"])
            judged = ("zeroshot",) if system.starts_from else ("knn", "linear_probe")
            values = [scores[key][0] for key in judged if key in scores]
            cells.append(f"{100 * statistics.mean(values):.1f}" if values else "-")
        lines.append(f"| {system.title} | {' | '.join(cells)} |")
    return lines


def draw_systems(systems: Mapping[str, Scores], path: Path) -> None:
    """Bars of each measure, with the seeds as dots."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    for place, (key, title) in enumerate(COLUMNS.items()):
        axes = figure.add_subplot(1, len(COLUMNS), place + 1)
        names = [name for name, scores in systems.items() if scores.get(key)]
        for row, name in enumerate(names):
            values = systems[name][key]
            axes.barh(row, 100 * statistics.mean(values), color="#9db8cc")
            axes.plot([100 * value for value in values], [row] * len(values), ".", color="#1d3f58", markersize=4)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("%  (a dot: a seed)")
    FigureCanvasAgg(figure).print_png(path)


def draw_ablations(records: Path, path: Path) -> None:
    """A curve for each of the method's settings."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.2), layout="constrained")
    for place, (key, ablation) in enumerate(ABLATIONS.items()):
        axes, scores = figure.add_subplot(1, len(ABLATIONS), place + 1), ablation_scores(records, key)
        for measure, color in (("linear_probe", "#2f6690"), ("knn", "#9aa5b1")):
            points = {value: mean_and_error(found[measure]) for value, found in scores.items() if found.get(measure)}
            means, errors = [mean for mean, _ in points.values()], [error for _, error in points.values()]
            axes.errorbar(list(points), means, errors, marker="o", capsize=2, color=color, label=COLUMNS[measure])
        axes.set_xlabel(ablation.title)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("%")
    figure.axes[0].legend(frameon=False)
    FigureCanvasAgg(figure).print_png(path)
