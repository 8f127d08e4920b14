"""Pictures of a run or a sweep, each a matplotlib figure: as SVG inside the page, as PNG in a file of its own."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_peft.readable import natural_order

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Curves by name: x and y of their points."""
COLOURS = ("#2f6fb5", "#d2662b", "#3c8c5a", "#8a5bb0", "#b8414f", "#7a6a53", "#4aa3b8", "#9a8f1f")
STYLE: Any = {
    "svg.hashsalt": "lightning-peft", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "axes.prop_cycle": cycler(color=COLOURS),
    "figure.autolayout": True,
}  # fmt: skip
SHOWN_NAMES = 12
"""Curves that a legend can name."""


def curves(series: Series, x_label: str, y_label: str) -> Figure:
    """Draw curves over one axis; a curve with a single point is a dot. A legend names up to `SHOWN_NAMES` of them."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 3.4))
        axes = figure.subplots()
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        for name, (x, y) in series.items():
            axes.plot(x, y, label=name, linewidth=1.4, marker="o" if len(x) < 20 else None, markersize=3)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if 1 < len(series) <= SHOWN_NAMES:
            axes.legend(frameon=False, fontsize=8)
        return figure


def dots(key: str, values: Sequence[Any], scores: Sequence[float], metric: str) -> Figure:
    """Draw one swept key against the metric, a dot a trial; words, and few numbers, are evenly spaced."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 3.4))
        axes = figure.subplots()
        places, names = _places(values)
        axes.plot([places[value] for value in values], scores, "o", color=COLOURS[0])
        if names:
            axes.set_xticks(range(len(names)), names)
        elif min(values) > 0 and max(values) / min(values) > 50:
            axes.set_xscale("log")
        axes.set_xlabel(key)
        axes.set_ylabel(metric)
        return figure


def heat_maps(
    row_key: str, column_key: str, panels: Mapping[str, Mapping[tuple[Any, Any], float]], metric: str, larger: bool
) -> Figure:
    """Draw a heat map a panel, (row, column) -> value, with one scale of colours for all; dark is good."""
    cells = [at for panel in panels.values() for at in panel]
    rows, columns = (ordered({at[axis] for at in cells}) for axis in (0, 1))
    values = [value for panel in panels.values() for value in panel.values()]
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        width = min(3, len(panels))
        height = math.ceil(len(panels) / width)
        size = (max(3.2, 0.85 * len(columns) + 1.6) * width, max(2.4, 0.55 * len(rows) + 1.4) * height)
        figure = Figure(figsize=size)
        grid = figure.subplots(height, width, squeeze=False)
        low, high = min(values), max(values)
        for axes, (title, panel) in zip(grid.flat, panels.items(), strict=False):
            table = [[panel.get((row, column), math.nan) for column in columns] for row in rows]
            axes.imshow(table, cmap="YlGnBu" if larger else "YlGnBu_r", vmin=low, vmax=high, aspect="auto")
            for y, row in enumerate(rows):
                for x, column in enumerate(columns):
                    value = panel.get((row, column))
                    share = 0.0 if value is None or high == low else (value - low) / (high - low)
                    is_dark = value is not None and (share if larger else 1 - share) > 0.55
                    text = "-" if value is None else f"{value:.4g}"
                    axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if is_dark else "black")
            axes.set_xticks(range(len(columns)), [short(value) for value in columns])
            axes.set_yticks(range(len(rows)), [short(value) for value in rows])
            axes.set_xlabel(column_key)
            axes.set_ylabel(row_key)
            axes.set_title(title or metric, fontsize=10)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_axis_off()
        return figure


def parallel(keys: Sequence[str], rows: Sequence[Sequence[Any]], scores: Sequence[float], metric: str) -> Figure:
    """Draw a line a trial through the values of all swept keys and the metric; the colour is the metric's."""
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(1.6 * (len(keys) + 1) + 1, 4))
        axes = figure.subplots()
        columns = [list(column) for column in zip(*rows, strict=True)] + [list(scores)]
        scaled = []
        for x, (name, column) in enumerate(zip([*keys, metric], columns, strict=True)):
            places, names = _places(column) if name != metric else ({value: value for value in column}, [])
            numbers = [float(places[value]) for value in column]
            low, high = min(numbers), max(numbers)
            scaled.append([(number - low) / (high - low) if high > low else 0.5 for number in numbers])
            axes.axvline(x, color="#bbbbbb", linewidth=0.8)
            marks: list[tuple[str, float]] = list(zip(names, range(len(names)), strict=True)) or [
                (short(low), low),
                (short(high), high),
            ]
            for text, number in marks:
                y = (number - low) / (high - low) if high > low else 0.5
                axes.text(x + 0.03, y, text, fontsize=8, va="center")
        low, high = min(scores), max(scores)
        colours = matplotlib.colormaps["viridis"]
        for line, score in zip(zip(*scaled, strict=True), scores, strict=True):
            axes.plot(
                line, color=colours((score - low) / (high - low) if high > low else 0.5), alpha=0.8, linewidth=1.2
            )
        axes.set_xticks(range(len(keys) + 1), [*keys, metric])
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        return figure


def reliability(ways: Mapping[str, Sequence[tuple[int, float, float]]]) -> Figure:
    """Draw accuracy over confidence, a curve a way; a bin is (tokens, confidence, accuracy), the diagonal is honest."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 4.2))
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8)
        for name, bins in ways.items():
            most = max(tokens for tokens, _, _ in bins)
            x, y = [confidence for _, confidence, _ in bins], [accuracy for _, _, accuracy in bins]
            (line,) = axes.plot(x, y, label=name, linewidth=1.2)
            axes.scatter(x, y, s=[6 + 60 * tokens / most for tokens, _, _ in bins], color=line.get_color(), alpha=0.6)
        axes.set_xlabel("confidence")
        axes.set_ylabel("accuracy")
        axes.legend(frameon=False, fontsize=8)
        return figure


def layer_map(
    cells: Mapping[tuple[str, int | None], float], spectra: Mapping[str, Sequence[float]], label: str
) -> Figure:
    """Draw a value by kind of layer and block, and beside it every layer's singular values by their number."""
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    blocks = sorted({-1 if block is None else block for _, block in cells})
    grid = [[cells.get((kind, None if block < 0 else block), math.nan) for block in blocks] for kind in kinds]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 1.6 + 0.28 * len(kinds)), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[3, 2])
        image = left.imshow(grid, aspect="auto", cmap="viridis", interpolation="nearest")
        left.set_yticks(range(len(kinds)), kinds)
        places = range(0, len(blocks), max(1, len(blocks) // 8))
        left.set_xticks(places, ["-" if blocks[place] < 0 else str(blocks[place]) for place in places])
        left.set_xlabel("block")
        left.grid(False)
        figure.colorbar(image, ax=left, label=label)
        for values in spectra.values():
            right.plot(range(1, len(values) + 1), values, linewidth=0.6, alpha=0.5, color="#1f6f8b")
        if any(value > 0 for values in spectra.values() for value in values):
            right.set_yscale("log")
        right.set_xlabel("singular value")
        right.set_ylabel("size")
        return figure


def svg(figure: Figure) -> str:
    """Return the figure as an SVG element that stands inside a page."""
    with matplotlib.rc_context(STYLE):
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()[file.getvalue().index("<svg") :]


def ordered(values: Any) -> list[Any]:
    """Sort numbers before words, and words by the numbers inside them: r4, r16."""
    return sorted(
        set(values), key=lambda value: (True, natural_order(value)) if isinstance(value, str) else (False, value)
    )


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _places(values: Sequence[Any]) -> tuple[dict[Any, float], list[str]]:
    """Return where each value stands, and the names of places; many numbers stand at themselves, without names."""
    kinds = ordered(values)
    if len(kinds) > SHOWN_NAMES and not any(isinstance(value, str) for value in kinds):
        return {value: float(value) for value in kinds}, []
    return {value: float(place) for place, value in enumerate(kinds)}, [short(value) for value in kinds]
