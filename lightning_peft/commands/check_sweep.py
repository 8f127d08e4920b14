"""The checks that refuse a sweep before any of its trials begins."""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace

from hydra.core.override_parser.types import Override

from lightning_peft.cluster.job import ClusterConfig
from lightning_peft.config import TrainConfig, plain
from lightning_peft.data.config import DataConfig
from lightning_peft.data.files import NoSuchRows
from lightning_peft.data.mixture import sources_of, validation_losses
from lightning_peft.data.samples import read_conversations
from lightning_peft.data.sources import SOURCES
from lightning_peft.evaluation.scorers import check_direction, names_of_metrics, scorers_of, task_of_metric
from lightning_peft.models.source import NoSuchModel
from lightning_peft.objectives.registry import validation_numbers
from lightning_peft.sweeps.pruning import rung_steps
from lightning_peft.sweeps.search import SweepConfig, typed_choices
from lightning_peft.sweeps.sweep import RESULT_NUMBERS, Trial
from lightning_peft.sweeps.table import OVER_SEEDS

logger = logging.getLogger(__name__)


def check_given_once(overrides: Sequence[Override]) -> None:
    """Raise ValueError for a swept key that another word gives as well, and for one without a value."""
    keys = [str(override.key_or_group) for override in overrides]
    for override in overrides:
        if override.is_sweep_override() and keys.count(str(override.key_or_group)) > 1:
            raise ValueError(f"{override.input_line}: {override.key_or_group} is given twice; leave one of them out")
        if override.is_discrete_sweep():
            typed_choices(override)


def check_trials_differ(trials: Sequence[Trial], runs: Sequence[TrainConfig]) -> None:
    """Raise ValueError where two trials are one training: it would count twice, as if it were another seed."""
    seen: dict[str, Trial] = {}
    for trial, run in zip(trials, runs, strict=False):
        options = json.dumps(plain(run), sort_keys=True, default=str).replace(json.dumps(run.run_dir)[1:-1], "")
        if (other := seen.setdefault(options, trial)) is not trial:
            one, another = (" ".join(found.overrides) for found in (trial, other))
            raise ValueError(f"{one}: is the same training as {another}; give each value once")


def rungs_of(config: SweepConfig, runs: Sequence[TrainConfig]) -> list[int]:
    """Find the steps at which trials pause.

    Raises ValueError where trials have no common length, or where the metric is not taken at a rung.
    """
    metric = config.metric.removeprefix("-")
    lengths = {run.trainer.get("max_steps") for run in runs}
    length = next(iter(lengths))
    if len(lengths) > 1 or not isinstance(length, int) or length < 2:
        raise ValueError(
            f"sweep.pruning={config.pruning.name} trainer.max_steps={','.join(map(str, lengths))}: rungs are steps of "
            "a run, so give trainer.max_steps, one for all trials"
        )
    scored = names_of_metrics(runs[0].validation.metrics, runs[0].data.task)
    known = (*validation_losses(runs[0].data), *validation_numbers(runs[0].objective.name), "train_loss", *scored)
    if metric not in known:
        raise ValueError(
            f"sweep.pruning={config.pruning.name} sweep.metric={config.metric}: is not taken at a rung; choose one of "
            f"{', '.join(known)}"
        )
    return rung_steps(length, config.reduction, config.min_steps)


def check_metric(metric: str, run: TrainConfig) -> None:
    """Raise ValueError for what the result of this trial will not hold, and for a sign that ranks the worst first."""
    name = metric.removeprefix("-")
    scored = names_of_metrics(run.validation.metrics, run.data.task)
    losses = [*validation_losses(run.data), *validation_numbers(run.objective.name)]
    if name not in (*RESULT_NUMBERS, *losses, *scored):
        known = ", ".join(dict.fromkeys((*scored, *RESULT_NUMBERS, *losses)))
        is_known = task_of_metric(name, run.data.task) is not None
        hint = f"; add validation.metrics=[{name}] to have it scored" if is_known else ""
        raise ValueError(
            f"sweep.metric={metric}: no number of a trial's result.json; choose one of {known}, "
            f"with a minus sign before it if it is to be large{hint}"
        )
    if over := [f"{name}_{what}" for what in OVER_SEEDS if f"{name}_{what}" in scored]:
        raise ValueError(
            f"sweep.metric={metric} validation.metrics: {over[0]} is the table's column of {name} over seeds; rename it"
        )
    check_direction("sweep.metric", metric)
    if not any(may_be_validated(source.config) for source in sources_of(run.data)) and name in (*losses, *scored):
        raise ValueError(
            f"sweep.metric={metric} data.validation_fraction=0: there are no validation rows; "
            "use sweep.metric=train_loss"
        )


def may_be_validated(data: DataConfig) -> bool:
    source = SOURCES.get(data.source)
    return source is None or "validation" in source.splits(data) or data.validation_fraction > 0


def check_scorers(runs: Sequence[TrainConfig]) -> None:
    """Raise ValueError where a trial could not score its `validation.metrics`: no such function, or no such column."""
    seen: list[tuple[list[str], DataConfig]] = []
    for run in runs:
        kind = (run.validation.metrics, run.data)
        if not run.validation.metrics or kind in seen:
            continue
        seen.append(kind)
        scorers = scorers_of(run.validation.metrics, run.data.task)
        if any(scorer.columns for scorer in scorers):
            rows = [row for row, _ in read_conversations(run.data, "validation", 1, tokenizer=None)]
            scorers_of(run.validation.metrics, run.data.task, [column for row in rows for column in row])


def check_rows(runs: Sequence[TrainConfig], cluster: ClusterConfig | None = None) -> None:
    """Raise ValueError where a trial would be refused its layers, its rows or its metrics once it begins.

    Each model with its layers and rows is read once, as the trial does; their tokens are kept for it. Missing rows are
    said and left to the trial, as is a model of which a node of the cluster may have a copy of its own.
    """
    # These import models and tokenizers, which a sweep of a cluster does without.
    from lightning_peft.commands.train import check_model, read_data, task_metrics
    from lightning_peft.models.loading import load_tokenizer
    from lightning_peft.runs.machine import Machine
    from lightning_peft.runs.plan import logging_left_to_ranks, plan_run

    seen: set[str] = set()
    for run in runs:
        run = replace(run, data=replace(run.data, preview=False), dry_run=False)
        asked = (run.validation.metrics, run.validation.metric_rows, run.validation.max_new_tokens)
        layers = (run.adapter.method, run.adapter.target_modules, run.adapter.init_from)
        key = repr((run.model, run.quantization, run.strategy, run.data, run.objective, asked, layers))
        if key in seen:
            continue
        seen.add(key)
        machine = Machine.here(run.trainer) if cluster is None else Machine.of_cluster(run.trainer, cluster)
        plan = plan_run(run, machine)
        try:
            with logging_left_to_ranks(True):  # the trial says it
                tokenizer = load_tokenizer(run.model)
                task_metrics(run, read_data(run, check_model(run), tokenizer, plan), tokenizer)
        except (NoSuchRows, NoSuchModel, OSError) as error:  # by the time that the trial begins it may be there
            if isinstance(error, NoSuchModel) and cluster is None:
                raise
            logger.warning("%s: a trial that needs it fails, unless it is there when the trial begins", error)
