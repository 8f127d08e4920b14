"""The page of a sweep: its table, its metric over every swept key, and the curves of all trials."""

from pathlib import Path
from typing import Any

from lightning_peft.report.figures import SHOWN_NAMES, curves, dots, heat_maps, ordered, parallel, short
from lightning_peft.report.page import Page
from lightning_peft.report.run import column, read_metrics
from lightning_peft.sweeps.cuts import cut_sentence
from lightning_peft.sweeps.doubts import doubts
from lightning_peft.sweeps.statistics import SEED, best_first, groups_of, sentence
from lightning_peft.sweeps.sweep import Sweep, metric_value, score
from lightning_peft.sweeps.table import best_trial, column_names, number_or_text, table_rows


def sweep_page(folder: Path, sweep: Sweep) -> Page:
    """Return the page of a sweep whose states are up to date."""
    page = Page(f"Sweep {folder.resolve().name}")
    metric = sweep.metric.removeprefix("-")
    page.note(f"{len(sweep.trials)} trials over {', '.join(sweep.swept)}")
    for said in sentences(folder, sweep):
        page.note(said)
    without = [trial for trial in sweep.trials if score(sweep, trial) is None]
    if without:
        page.note(f"without a number, and in no picture: {', '.join(f'{t.name} ({t.state})' for t in without)}")
    page.heading("Trials")
    rows = table_rows(sweep, sweep.metric)
    head = list(dict.fromkeys(key for row in rows for key in row))
    page.table(head, [[row.get(name) for name in head] for row in rows], "sortable")
    _metric(page, sweep, metric)
    _curves(page, folder, sweep)
    page.heading("Where it comes from")
    page.folded("words that all trials share", "\n".join(sweep.words))
    return page


def sentences(folder: Path, sweep: Sweep) -> list[str]:
    """Return the best trial, what keeps numbers from being compared, and what the sweep has shown."""
    best = best_trial(sweep)
    of_best = None if best is None else f"best {sweep.metric.removeprefix('-')}: {best[1]:.6g} of {best[0]}"
    said = (of_best, *doubts(sweep), sentence(sweep), cut_sentence(sweep, folder, str(folder)))
    return [text for text in said if text is not None]


def _metric(page: Page, sweep: Sweep, metric: str) -> None:
    """Add pictures of the metric over all swept keys; trials that differ by their seed alone are averaged, and said."""
    names = column_names(sweep)
    keys = [key for key in sweep.swept_keys if key != SEED]
    groups = best_first(groups_of(sweep), sweep.metric)
    if not groups:
        return
    if not keys:
        _over_seeds(page, sweep, metric)
        return
    page.heading(f"{metric} over {', '.join(names[key] for key in keys)}")
    if (most := max(len(group.scores) for group in groups)) > 1:
        page.note(f"each point or cell is the mean of up to {most} trials that differ by seed")
    scores = {tuple(number_or_text(group.values[key]) for key in keys): group.mean for group in groups}
    shown = [names[key] for key in keys]
    kinds = [ordered({at[i] for at in scores}) for i in range(len(keys))]
    is_gridded = all(len(kind) <= SHOWN_NAMES for kind in kinds)
    if len(keys) == 1:
        page.figure("metric", dots(shown[0], [at[0] for at in scores], list(scores.values()), metric))
        return
    if len(keys) <= 3 and is_gridded:
        order = sorted(range(len(keys)), key=lambda i: keys[i] not in ("adapter.rank", "adapter.alpha"))
        panels: dict[str, dict[tuple[Any, Any], float]] = {}
        for value in kinds[order[2]] if len(keys) == 3 else [None]:
            title = "" if value is None else f"{shown[order[2]]} {short(value)}"
            panels[title] = {
                (at[order[0]], at[order[1]]): number
                for at, number in scores.items()
                if value is None or at[order[2]] == value
            }
        larger = sweep.metric.startswith("-")
        figure = heat_maps(shown[order[0]], shown[order[1]], panels, metric, larger)
        page.figure("metric", figure, "dark is good; all panels share one scale" if len(keys) == 3 else "dark is good")
        return
    page.figure("metric", parallel(shown, list(scores), list(scores.values()), metric), "a line a trial")


def _over_seeds(page: Page, sweep: Sweep, metric: str) -> None:
    """Add a picture of a sweep over nothing but seeds, which has one group."""
    found = {trial.values[SEED]: trial for trial in sweep.trials if score(sweep, trial) is not None}
    values = {number_or_text(seed): metric_value(trial.result, metric) for seed, trial in found.items()}
    page.heading(f"{metric} over the seeds")
    page.figure("metric", dots(SEED, list(values), [value for value in values.values() if value is not None], metric))


def _curves(page: Page, folder: Path, sweep: Sweep) -> None:
    rows = {trial.name: read_metrics(folder / trial.name) for trial in sweep.trials}
    for key, name in (("loss", "training loss"), ("validation_loss", "validation loss")):
        series = {trial: column(found, key) for trial, found in rows.items()}
        series = {trial: points for trial, points in series.items() if len(points[0]) > 1}
        if series:
            page.heading(f"{name.capitalize()} of {len(series)} trials")
            if len(series) > SHOWN_NAMES:
                page.note(f"the legend is left out: more than {SHOWN_NAMES} curves")
            page.figure(key, curves(series, "step", name))
