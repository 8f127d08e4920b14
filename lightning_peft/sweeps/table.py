"""A sweep's results: rows to sort, the best by a metric, and the metric over two swept keys as a heat map."""

import csv
import html
import io
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_peft.readable import natural_order
from lightning_peft.sweeps.statistics import SEED, SeedGroup, best_first, groups_of
from lightning_peft.sweeps.sweep import FINISHED, Sweep, Trial, hours_of, score

RESULT_COLUMNS = (
    "steps", "train_loss", "validation_loss", "trainable_parameters", "tokens_per_second", "peak_memory_gib", "seconds",
)  # fmt: skip
OVER_SEEDS = ("mean", "spread", "low", "high")
"""Endings of the columns of a metric over seeds."""
CELL_WIDTH, CELL_HEIGHT, MARGIN = 92, 40, 96
LIGHT, DARK = (253, 231, 37), (59, 82, 139)
"""Colours of the worst and the best value."""


def short_name(key: str) -> str:
    return key.rpartition(".")[2]


def table_rows(sweep: Sweep, sort: str) -> list[dict[str, Any]]:
    """Return a row for each trial: name, swept values, state, attempts, exit code, results.

    `sort` is a column, -column descends; trials that have nothing in it, or no finite number, come last. By a result,
    those that have finished come first. A swept key goes by its last part where no other column is called so. Where
    seeds are swept, each row has mean, spread and interval over those of its group.
    """
    names = column_names(sweep)
    over_seeds = seed_columns(sweep)
    rows = [
        {"trial": trial.name}
        | {names.get(key, key): number_or_text(value) for key, value in trial.values.items()}
        | {"state": trial.state, "attempts": trial.attempts, "exit_code": trial.exit_code}
        | {column: (trial.result or {}).get(column) for column in RESULT_COLUMNS}
        | {"seconds": seconds_of(trial)}
        | (trial.result or {}).get("metrics", {})
        | over_seeds.get(trial.name, {})
        for trial in sweep.trials
    ]
    column = sort.removeprefix("-")
    results = {*RESULT_COLUMNS, *metric_names(sweep)}
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if rows and column not in columns:
        raise ValueError(f"sort={sort}: no such column; choose one of {', '.join(columns)}")
    known = [row for row in rows if is_ranked(row.get(column))]
    known.sort(key=lambda row: sort_key(row[column]), reverse=sort.startswith("-"))
    if column in results:  # one that is paused or has diverged is before none that has finished
        known.sort(key=lambda row: row["state"] != FINISHED)
    return known + [row for row in rows if not is_ranked(row.get(column))]


def seconds_of(trial: Trial) -> float | None:
    """Return the time that a trial took over all its starts: its result has that of the last one."""
    seconds = (trial.result or {}).get("seconds")
    hours = hours_of(trial.result)
    return seconds * (1 + trial.spent_hours / hours) if seconds is not None and hours else seconds


def seed_columns(sweep: Sweep) -> dict[str, dict[str, Any]]:
    """Return, by trial, what its group says of the sweep's metric; empty where no seed is swept."""
    if SEED not in sweep.swept_keys:
        return {}
    metric = sweep.metric.removeprefix("-")
    found: dict[str, dict[str, Any]] = {}
    for group in groups_of(sweep):
        low, high = group.interval or (None, None)
        numbers = (group.mean if group.scores else None, group.spread, low, high)
        columns: dict[str, Any] = {"seeds": len(group.scores)}
        columns |= {f"{metric}_{what}": number for what, number in zip(OVER_SEEDS, numbers, strict=True)}
        found |= dict.fromkeys(group.names, columns)
    return found


def metric_names(sweep: Sweep) -> list[str]:
    """Return the names of the trials' metrics."""
    return list(dict.fromkeys(name for trial in sweep.trials for name in (trial.result or {}).get("metrics", {})))


def column_names(sweep: Sweep) -> dict[str, str]:
    """Return the column of each swept key."""
    short = Counter(short_name(key) for key in sweep.swept_keys)
    taken = {"trial", "state", "attempts", "exit_code", *RESULT_COLUMNS, *metric_names(sweep)}
    free = {key: key if key not in taken else f"swept {key}" for key in sweep.swept_keys}
    return {
        key: free[key] if short[short_name(key)] > 1 or short_name(key) in taken else short_name(key)
        for key in sweep.swept_keys
    }


def is_ranked(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def number_or_text(value: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def sort_key(value: Any) -> tuple[bool, Any]:
    return (False, value) if isinstance(value, int | float) else (True, natural_order(str(value)))


def best_trial(sweep: Sweep) -> tuple[str, float] | None:
    """Return (name, value) of the finished trial whose metric is best; None while there is none."""
    scores = [(value, trial.name) for trial in sweep.trials if (value := score(sweep, trial)) is not None]
    if not scores:
        return None
    value, name = min(scores)
    return name, -value if sweep.metric.startswith("-") else value


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def json_text(rows: Sequence[dict[str, Any]]) -> str:
    """Return strict JSON: a number that is not finite is null."""
    finite = [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        for row in rows
    ]
    return json.dumps(finite, indent=1, allow_nan=False) + "\n"


@dataclass(frozen=True)
class HeatMap:
    """The best value of a metric, a mean over seeds where they are swept, at each pair of values of two swept keys."""

    metric: str
    best_over: str
    """The other swept keys, of whose values each cell shows the best; empty with two swept keys."""
    is_mean: bool
    larger_is_better: bool
    row_key: str
    column_key: str
    rows: list[int | float | str]
    columns: list[int | float | str]
    cells: dict[tuple[Any, Any], float]


def heat_map(sweep: Sweep) -> HeatMap | None:
    """Return the map over rank and alpha where both are swept, else over the first two keys but the seed; else None."""
    keys = [key for key in sweep.swept_keys if key != SEED]
    keys = sorted(keys, key=lambda key: key not in ("adapter.rank", "adapter.alpha"))
    keys, others = keys[:2], keys[2:]
    if len(keys) < 2:
        return None
    names = column_names(sweep)
    axes: list[list[Any]] = [
        sorted({number_or_text(trial.values[key]) for trial in sweep.trials}, key=sort_key) for key in keys
    ]

    def place(group: SeedGroup) -> tuple[Any, Any]:
        return number_or_text(group.values[keys[0]]), number_or_text(group.values[keys[1]])

    ordered = best_first(groups_of(sweep), sweep.metric)
    return HeatMap(
        metric=sweep.metric.removeprefix("-"),
        best_over=", ".join(names[key] for key in others),
        is_mean=SEED in sweep.swept_keys,
        larger_is_better=sweep.metric.startswith("-"),
        row_key=names[keys[0]],
        column_key=names[keys[1]],
        rows=axes[0],
        columns=axes[1],
        cells={place(group): group.mean for group in reversed(ordered)},
    )


def svg_text(map: HeatMap) -> str:
    """Return a picture for a browser or a README: rows and columns labelled, every cell with its value."""
    values = map.cells.values()
    low, high = (min(values), max(values)) if values else (0.0, 0.0)
    width = MARGIN + CELL_WIDTH * len(map.columns) + 12
    height = 64 + CELL_HEIGHT * len(map.rows) + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="14" text-anchor="middle">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{width / 2}" y="20">{html.escape(heat_map_title(map))}</text>',
        label(MARGIN / 2, 52, f"{map.row_key} \\ {map.column_key}"),
    ]
    parts += [label(MARGIN + CELL_WIDTH * (x + 0.5), 52, value) for x, value in enumerate(map.columns)]
    for y, row in enumerate(map.rows):
        top = 64 + CELL_HEIGHT * y
        parts.append(label(MARGIN / 2, top + 25, row))
        for x, column in enumerate(map.columns):
            value = map.cells.get((row, column))
            share = 0.0 if value is None or high == low else (value - low) / (high - low)
            goodness = share if map.larger_is_better else 1 - share
            fill, ink = ("#eeeeee", "black") if value is None else colours(goodness)
            left = MARGIN + CELL_WIDTH * x
            parts.append(
                f'<rect x="{left}" y="{top}" width="{CELL_WIDTH - 2}" height="{CELL_HEIGHT - 2}" fill="{fill}"/>'
            )
            parts.append(label(left + CELL_WIDTH / 2, top + 25, "-" if value is None else f"{value:.4g}", ink))
    return "\n".join([*parts, "</svg>"]) + "\n"


def heat_map_title(map: HeatMap) -> str:
    mean = ", mean over seed" if map.is_mean else ""
    return f"{map.metric}{mean}" + (f", best over {map.best_over}" if map.best_over else "")


def label(x: float, y: float, text: Any, ink: str = "black") -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{ink}">{html.escape(str(text))}</text>'


def colours(goodness: float) -> tuple[str, str]:
    """Return (fill, ink) between LIGHT at 0 and DARK at 1."""
    mixed = [round(a + (b - a) * goodness) for a, b in zip(LIGHT, DARK, strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*mixed), "white" if goodness > 0.5 else "black"


def html_text(rows: Sequence[dict[str, Any]], picture: str | None) -> str:
    """Return a page with the table and, where there is one, the heat map."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(shown(row.get(column)))}</td>" for column in columns) + "</tr>\n"
        for row in rows
    )
    style = "<style>td,th{padding:2px 10px;text-align:right;font-family:sans-serif}</style>"
    return f"<!doctype html>\n<meta charset=utf-8>{style}\n{picture or ''}<table><tr>{head}</tr>\n{body}</table>\n"


def shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
