"""The page of one run, from the files in its folder."""

import csv
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning_peft.report.figures import Series, curves
from lightning_peft.report.page import Page
from lightning_peft.strict_json import read_object
from lightning_peft.tracking.cells import number_of

KNOWN = (
    "step", "loss", "grad_norm", "lr", "tokens", "supervised_tokens", "step_seconds", "tokens_per_second",
    "supervised_tokens_per_second", "peak_memory_gib", "validation_loss", "trainable_parameters", "rank", "alpha",
    "epoch", "total_tokens",
)  # fmt: skip
"""Columns of metrics.csv that have a picture of their own or need none; others are drawn one picture a kind."""
SHOWN_CURVES = 8
"""Curves of one kind that are drawn one by one."""
SAMPLES = 20
Z95 = 1.959964


def run_page(folder: Path) -> Page:
    """Return the page of a run. Raises ValueError for a folder without metrics, which no run has written to."""
    rows = read_metrics(folder)
    if not rows:
        raise ValueError(f"report: {folder} has no metrics.csv with a step in it: give the folder of a run or sweep")
    result = _json(folder / "result.json")
    page = Page(folder.resolve().name)
    page.note(f"{result.get('status', 'not ended')}, {int(rows[-1]['step'])} steps")
    if result:
        _facts(page, result)
    _curves(page, rows)
    _scores(page, _json(folder / "evaluation.json"))
    _samples(page, folder / "samples.jsonl")
    page.heading("Where it comes from")
    for name in ("config.yaml", "adapter/lineage.json", "model/lineage.json"):
        if (folder / name).is_file():
            page.folded(name, (folder / name).read_text(encoding="utf-8", errors="replace"))
    return page


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the rows of metrics.csv, of each the cells that hold a finite number."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        return [
            {name: number for name, cell in row.items() if (number := number_of(cell)) is not None}
            for row in csv.DictReader(file)
            if number_of(row.get("step")) is not None
        ]


def column(
    rows: Sequence[dict[str, float]], name: str, x: Sequence[float] | None = None
) -> tuple[list[float], list[float]]:
    """Return the points of a column, over `x` or the steps."""
    at = x if x is not None else [row["step"] for row in rows]
    points = [(place, row[name]) for place, row in zip(at, rows, strict=True) if name in row]
    return [place for place, _ in points], [value for _, value in points]


def _curves(page: Page, rows: list[dict[str, float]]) -> None:
    page.heading("Curves")
    losses = {"training": "loss", "validation": "validation_loss"}
    over_steps = {name: column(rows, key) for name, key in losses.items()}
    page.figure("loss", curves({n: c for n, c in over_steps.items() if c[0]}, "step", "loss per token"), "", "half")
    total, tokens = 0.0, []
    for row in rows:
        total += row.get("tokens", 0.0)
        tokens.append(total)
    if total:
        over_tokens = {name: column(rows, key, tokens) for name, key in losses.items()}
        page.figure(
            "loss_over_tokens", curves({n: c for n, c in over_tokens.items() if c[0]}, "tokens", "loss per token")
        )
    single = {
        "lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_second": "tokens per second",
        "peak_memory_gib": "peak memory, GiB",
    }  # fmt: skip
    for key, name in single.items():
        if (points := column(rows, key))[0]:
            page.figure(key, curves({name: points}, "step", name), "", "half")
    for name, keys in families(key for row in rows for key in row if key not in {*KNOWN, *single}).items():
        found = {member: points for member, key in keys.items() if (points := column(rows, key))[0]}
        if any(len(set(values)) > 1 for _, values in found.values()):
            series, caption = readable(found)
            label = name.replace("_", " ")
            page.figure(name.replace("/", "_").replace(" ", "_"), curves(series, "step", label), caption, "half")


def families(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return the columns that are of one kind, of a layer or a source each, by the kind's name and then by theirs."""
    found: dict[str, dict[str, str]] = {}
    for key in dict.fromkeys(keys):
        first, *middle = key.split("/")
        name = f"{first} {middle.pop()}" if len(middle) > 1 else first
        found.setdefault(name, {})["/".join(middle) or name] = key
    return found


def readable(series: Series) -> tuple[Series, str]:
    """Return curves of one kind that can be told apart, and a caption: of many the highest, median and lowest."""
    if len(series) <= SHOWN_CURVES:
        return series, ""
    at_step: dict[float, list[float]] = {}
    for steps, values in series.values():
        for step, value in zip(steps, values, strict=True):
            at_step.setdefault(step, []).append(value)
    steps = sorted(at_step)
    of_all = {"highest": max, "median": statistics.median, "lowest": min}
    last = sorted(series, key=lambda name: series[name][1][-1])
    caption = (
        f"{len(series)} curves, the highest, median and lowest value at each step; at the end {last[-1]} is highest, "
        f"{last[0]} lowest; metrics.csv has all"
    )
    return {name: (steps, [float(of(at_step[step])) for step in steps]) for name, of in of_all.items()}, caption


def _facts(page: Page, result: dict[str, Any]) -> None:
    shown = (
        "train_loss", "validation_loss", "trainable_parameters", "total_parameters", "tokens_per_second",
        "peak_memory_gib", "seconds",
    )  # fmt: skip
    facts = {name: result.get(name) for name in shown} | result.get("metrics", {})
    page.table(["", "value"], [(name.replace("_", " "), value) for name, value in facts.items() if value is not None])


def _scores(page: Page, evaluation: dict[str, Any]) -> None:
    models = [name for name in ("base", "adapter") if name in evaluation]
    if not models:
        return
    page.heading("Scores")
    count = evaluation.get("rows", 0)
    page.note(
        f"{count} rows for metrics, {evaluation.get('loss_rows', count)} for losses, none seen in training; "
        "intervals are Wilson's, 95 %"
    )
    rows: list[list[Any]] = [["loss per token", *(evaluation[name].get("loss") for name in models)]]
    for metric in evaluation[models[0]].get("metrics", {}):
        values = [evaluation[name]["metrics"].get(metric) for name in models]
        rows.append([metric.replace("_", " "), *(with_interval(value, count) for value in values)])
    page.table(["", *models], rows)


def with_interval(share: float | None, count: int) -> str | None:
    """Return a share with Wilson's 95 % interval (1927); a number outside 0..1, which is no share, by itself."""
    if share is None or not 0 <= share <= 1 or count < 1:
        return None if share is None else f"{share:.4g}"
    centre = (share + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 / (1 + Z95**2 / count) * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    return f"{share:.1%} ({max(0.0, centre - half):.1%} to {min(1.0, centre + half):.1%})"


def _samples(page: Page, path: Path) -> None:
    if not path.is_file():
        return
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    rows = [row for line in lines if (row := _sample(line)) is not None]
    if len(rows) < len(lines):  # a run that was killed leaves the last one so
        page.note(f"{len(lines) - len(rows)} of {len(lines)} lines of {path.name} are damaged, and left out")
    if not rows:
        return
    last = max(row["step"] for row in rows)
    chosen = [row for row in rows if row["step"] == last]
    page.heading(f"Answers at step {last}")
    if len(chosen) > SAMPLES:
        page.note(f"the first {SAMPLES} of {len(chosen)}; all of them, of every validation, are in {path.name}")
    names = list(dict.fromkeys(key for row in chosen for key in row if key != "step"))
    page.table(names, [[str(row.get(name, "")) for name in names] for row in chosen[:SAMPLES]], "texts")


def _sample(line: str) -> dict[str, Any] | None:
    """Return what a line of samples.jsonl holds; None for one that no run has written so."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _json(path: Path) -> dict[str, Any]:
    return read_object(path, "the page needs what it says") if path.is_file() else {}
