"""The report of a sweep in Weights & Biases: its table and sentences, and charts of the runs that its trials logged.

W&B's server makes it and keeps it: already to name a set of runs it is asked for the number of their project.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

import yaml

from lightning_peft.report.sweep import sentences
from lightning_peft.sweeps.sweep import Sweep
from lightning_peft.sweeps.table import shown, table_rows
from lightning_peft.tracking.charts import STEP, validation_chart
from lightning_peft.tracking.service_record import record_path, service_record
from lightning_peft.tracking.wandb_run import PROJECT, VARIABLES, has_wandb_key, mode_of_user

CHARTS = ("train/loss", "validation/loss")


def check_wandb_report(folder: Path, sweep: Sweep | None) -> None:
    """Raise ValueError where no report can be written in W&B, before anything is drawn."""
    if sweep is None:
        raise ValueError("wandb=true: writes the report of a sweep; a run has a page of its own in W&B")
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise ValueError("wandb=true: needs wandb-workspaces; pip install 'lightning-peft[workspaces]'")
    if not has_wandb_key() or mode_of_user() not in ("online", "run", "shared"):
        raise ValueError(
            "wandb=true: W&B writes reports on its server only; give it a key (wandb login) and no WANDB_MODE, or "
            "leave it out: the page needs no server"
        )
    if not logged(folder, sweep):
        raise ValueError(f"wandb=true: no trial of {folder} was logged to W&B; train it with logger=wandb")


def logged(folder: Path, sweep: Sweep) -> list[Path]:
    """Return the folders of the trials that have a run in W&B."""
    return [folder / trial.name for trial in sweep.trials if record_path(folder / trial.name, "wandb").is_file()]


def write_wandb_report(folder: Path, sweep: Sweep) -> str:
    """Write the report and return its address. Raises ValueError for what the server or its client says."""
    # An optional package, which takes seconds.
    import wandb
    import wandb_workspaces.reports.v2 as reports

    runs = logged(folder, sweep)
    options = yaml.safe_load((runs[0] / "config.yaml").read_text(encoding="utf-8"))["logger"]["wandb"]
    project = options.get("project") or os.environ.get(VARIABLES["project"]) or PROJECT
    ids = [service_record(run, "wandb")["id"] for run in runs]
    try:
        entity = options.get("entity") or os.environ.get("WANDB_ENTITY") or wandb.Api().default_entity
        metric = sweep.metric.removeprefix("-")
        is_scored = any(metric in trial.result.get("metrics", {}) for trial in sweep.trials if trial.result)
        chart = validation_chart(metric) if is_scored or metric == "validation_loss" else metric
        axes = [reports.ParallelCoordinatesPlotColumn(metric=reports.Config(key)) for key in sweep.swept_keys]
        axes.append(reports.ParallelCoordinatesPlotColumn(metric=reports.SummaryMetric(chart)))
        panels: list[Any] = [reports.ParallelCoordinatesPlot(columns=axes)]
        panels += [reports.LinePlot(x=STEP, y=[name]) for name in dict.fromkeys((*CHARTS, chart)) if "/" in name]
        found = reports.Runset(entity=entity, project=project, name=folder.resolve().name, filters=f"ID in {ids!r}")
        report = reports.Report(
            entity=entity,
            project=project,
            title=f"Sweep {folder.resolve().name}",
            description=f"{len(sweep.trials)} trials over {', '.join(sweep.swept)}",
            blocks=[
                *[reports.P(said) for said in sentences(folder, sweep)],
                reports.MarkdownBlock(markdown_table(sweep)),
                reports.PanelGrid(runsets=[found], panels=panels),
            ],
        )
        return str(report.save().url)
    except Exception as error:  # its client raises bare ones, too
        raise ValueError(f"no report was written in W&B: {' '.join(str(error).split())}") from error


def markdown_table(sweep: Sweep) -> str:
    rows = table_rows(sweep, sweep.metric)
    head = list(dict.fromkeys(key for row in rows for key in row))
    lines = [head, ["---"] * len(head), *[[shown(row.get(name)) for name in head] for row in rows]]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
