"""`lightning-peft sweep status|retry|cancel|table DIR`: a look at a sweep, or a change of its course."""

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning_peft import readable
from lightning_peft.checkpoint.atomic import write_text
from lightning_peft.cluster.process import LEAVE
from lightning_peft.command_configs.of_runs import SubmitSweepConfig, SweepCommandConfig, SweepVerb
from lightning_peft.commands.plan_sweep import any_draw, ask, split_words, start, trial_config, trial_words, write_run
from lightning_peft.commands.sweep_array import array_work, task_folder, turn
from lightning_peft.compose import compose_config
from lightning_peft.config import TrainConfig
from lightning_peft.runs.folder import LEFT_BY_A_RUN, check_saved_config
from lightning_peft.runs.lock import only_writer
from lightning_peft.sweeps.budget import budget_in_words, hours_of_trial, is_over_budget
from lightning_peft.sweeps.change_lock import may_be_changed
from lightning_peft.sweeps.cuts import cut_sentence
from lightning_peft.sweeps.doubts import doubts
from lightning_peft.sweeps.local_worker import end, start_workers
from lightning_peft.sweeps.next_trial import work_to_begin
from lightning_peft.sweeps.place import cluster_of, find_jobs, task_of
from lightning_peft.sweeps.pruning import paused_at_rung, rungs_in_words
from lightning_peft.sweeps.search import WITH_TURNS, SweepPlace
from lightning_peft.sweeps.statistics import SEED, best_first, groups_of, next_command, sentence
from lightning_peft.sweeps.sweep import (
    HYDRA,
    MANIFEST,
    RUNNING,
    TO_BE_RETRIED,
    WAITING,
    Sweep,
    Trial,
    changed_sweep,
    metric_value,
    read_sweep,
    refresh,
    state_in_words,
)
from lightning_peft.sweeps.table import (
    best_trial,
    csv_text,
    heat_map,
    html_text,
    json_text,
    shown,
    svg_text,
    table_rows,
)
from lightning_peft.terminal_table import print_rows
from lightning_peft.tracking.service_record import forget_steps

logger = logging.getLogger(__name__)

SHOWN_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "state": ("state", str),
    "attempts": ("tries", readable.number),
    "steps": ("steps", readable.number),
    "train_loss": ("train\nloss", readable.loss),
    "validation_loss": ("valid.\nloss", readable.loss),
    "tokens_per_second": ("tokens/s", readable.number),
    "seconds": ("time", readable.short_duration),
}
"""Columns that fit 80 characters beside the trial, each with its heading and its form; files have every column."""
SECONDS_FOR_ANOTHER_RETRY = 60.0
"""Time to wait for another retry: more than a cluster takes to answer."""
BUDGET = "sweep.budget_gpu_hours"
"""The one key of the sweep that a retry may change."""
RANK = {"rank", "adapter.rank"}
"""Two words of one key."""
OWN_KEYS = tuple(SweepCommandConfig.__dataclass_fields__)


def sweep(words: list[str]) -> None:
    """Run a verb. `words` are the verb, the folder and keys of this command; for retry also overrides of train."""
    named = [word for word in words if "=" not in word or (Path(word) / MANIFEST).is_file()]
    keyed = [word for word in words if word not in named]
    own = [word for word in keyed if word.partition("=")[0] in OWN_KEYS]
    overrides = [word for word in keyed if word not in own]
    own += [f"{key}={word}" for key, word in zip(("verb", "sweep_dir"), named, strict=False)]
    if len(named) > 2:
        raise ValueError(f"{named[2]}: not of the form key=value; sweep takes a verb and a folder")
    config: SweepCommandConfig = compose_config("sweep", own if own else ["verb=???"])
    if overrides and config.verb is not SweepVerb.retry:
        raise ValueError(f"{overrides[0]}: overrides are for sweep retry")
    if config.verb is SweepVerb.retry:
        retry(config, overrides)
    else:
        VERBS[config.verb](config)


def look(sweep: Sweep, folder: Path, gone: str | None = None) -> None:
    """Bring the states up to date."""
    if gone is not None:
        sweep.forget_machine(gone)
    refresh(sweep, folder, find_jobs(sweep))


def seen(config: SweepCommandConfig) -> Sweep:
    """Return the sweep as it stands now, and bring its file up to date, unless that belongs to another user."""
    folder = Path(config.sweep_dir)
    if (folder / MANIFEST).is_file() and not may_be_changed(folder):
        sweep = read_sweep(folder)
        look(sweep, folder, config.gone)
        return sweep
    with changed_sweep(folder) as sweep:
        look(sweep, folder, config.gone)
    return sweep


def status(config: SweepCommandConfig) -> None:
    folder = Path(config.sweep_dir)
    sweep = seen(config)
    metric = sweep.metric.removeprefix("-")
    rows = [
        (t.name, (state_in_words(t), str(t.attempts), shown(t.exit_code), shown(metric_value(t.result, metric))))
        for t in sweep.trials
    ]
    print_rows("trial", ("state", "attempts", "exit code", metric), rows)
    print(summary(sweep))
    if sweep.rungs:
        print(rungs_in_words(sweep))
    if sweep.budget_gpu_hours is not None:
        print(budget_in_words(sweep, folder, config.sweep_dir.rstrip("/")))
    if others := sweep.other_machines():
        print(f"taken to run on {others}, which cannot be seen from here; gone=NAME says that a machine is no more")


def summary(sweep: Sweep) -> str:
    """Return a line such as "8 trials: 6 finished, 2 running"."""
    counts = Counter(trial.state for trial in sweep.trials)
    if undrawn := sweep.count - len(sweep.trials):
        counts["to be drawn"] = undrawn
    return f"{sweep.count} trials: " + ", ".join(f"{count} {state}" for state, count in counts.items())


def retry(config: SweepCommandConfig, overrides: list[str]) -> None:
    """Run trials again: from their checkpoints, or afresh where the overrides change what is trained.

    A second retry waits for the first, whose trials then wait or run and are not started twice.
    """
    folder = Path(config.sweep_dir).resolve()
    if read_sweep(folder).cluster == HYDRA:
        raise ValueError(
            f"sweep retry: train -m ran {folder}; its own words with run_dir={folder} resume=auto go on with it"
        )
    with only_writer(folder, "sweep_dir", SECONDS_FOR_ANOTHER_RETRY):
        start_again(config, overrides, folder)


def refuse_swept(words: Sequence[str], sweep: Sweep) -> None:
    """Raise ValueError for a word of a swept key: a trial would be ranked by a value that it was not trained with."""
    swept = set(sweep.swept_keys)
    if swept & RANK:
        swept |= RANK
    for word in words:
        if (key := word.lstrip("+~").partition("=")[0]) in swept:
            raise ValueError(f"{word}: {key} is swept, so each trial keeps its own; submit other values as a sweep")


def start_again(config: SweepCommandConfig, overrides: list[str], folder: Path) -> None:
    own, run_words = split_words(overrides)
    budget = more_budget([word for word in own if word.startswith(f"{BUDGET}=")])
    if config.failed == bool(config.trials) and (config.failed or budget is None):
        raise ValueError("sweep retry: say which, failed=true or trials=[NAME,...]")
    if kept := [word for word in own if not word.startswith(f"{BUDGET}=")]:
        raise ValueError(f"{kept[0]}: of the sweep as it was submitted; a retry changes those of its runs")
    with changed_sweep(folder) as sweep:
        refuse_swept(run_words, sweep)
        look(sweep, folder, config.gone)
        if budget is not None and SweepPlace[sweep.cluster] not in WITH_TURNS:
            raise ValueError(
                f"{BUDGET}={budget:g}: is kept with cluster=local or slurm, and {folder} runs on {sweep.cluster}"
            )
        if budget is not None and sweep.budget_gpu_hours is None and sweep.pruning == "none" and sweep.arrays:
            raise ValueError(f"{BUDGET}={budget:g}: {folder} was submitted without one, so its tasks ask for nothing")
        if budget is not None:
            sweep.budget_gpu_hours, sweep.is_spent = budget, False
        if is_over_budget(sweep, folder):
            raise ValueError(f"sweep retry: {budget_in_words(sweep, folder, config.sweep_dir.rstrip('/'))}")
        chosen = [sweep.trial(name) for name in config.trials] or (sweep.trials if config.failed else [])
        # A trial that a rung stopped has not failed; by its name it can be let on all the same.
        stopped = [trial for trial in paused_at_rung(sweep) if not config.trials]
        again = [trial for trial in chosen if trial.state in TO_BE_RETRIED and trial not in stopped]
        is_drawing = any(worker.is_alive for worker in sweep.workers) or has_active_array(sweep)
        undrawn = 0 if is_drawing else sweep.count - len(sweep.trials)
        # Slots leave when there is nothing for them; an end after that may let a trial on that no slot is there for.
        is_left = sweep.has_slots and not is_drawing and work_to_begin(sweep) > 0
        if not again and not undrawn and budget is None and not is_left:
            states = [f"{trial.name} is {trial.state}" for trial in chosen] if config.trials else [summary(sweep)]
            hint = (
                f"; gone=NAME says that a machine is no more ({others})" if (others := sweep.other_machines()) else ""
            )
            raise ValueError(f"sweep retry: nothing to run again: {', '.join(states)}{hint}")
        runs = [trial_config(sweep, trial, folder, run_words) for trial in again]
        if runs and runs[0].cluster is not None:
            cluster_of(sweep).check(runs[0].cluster, array_work(sweep, again, folder, runs[0]))
        for trial, run in zip(again, runs, strict=True):
            trial.spent_hours = hours_of_trial(sweep, trial, folder / trial.name)
            prepare_again(trial, run, folder / trial.name, trial_words(sweep, trial, folder, run_words))
            trial.other_words = run_words
    logger.info("%s: %d trials run again", folder, len(again) + undrawn)
    if sweep.has_slots:
        one = next(iter([*again, *sweep.trials]), None) or any_draw(sweep)
        start(folder, [trial.name for trial in again], trial_config(sweep, one, folder, run_words))
        return
    if again:
        start(folder, [trial.name for trial in again], runs[0])
    if undrawn:
        start(folder, [], trial_config(sweep, any_draw(sweep), folder, run_words))
    if budget is not None and not again and not undrawn:
        start_workers(folder)


def more_budget(words: list[str]) -> float | None:
    """Return the budget that a retry is given; None without one. Raises ValueError as `submit -m` does."""
    if not words:
        return None
    config: SubmitSweepConfig = compose_config("submit_sweep", [*words, "sweep.cluster=local"])
    if config.sweep.budget_gpu_hours is None:
        raise ValueError(f"{words[0]}: give the hours that the sweep may take in all")
    return config.sweep.budget_gpu_hours


def has_active_array(sweep: Sweep) -> bool:
    return any(job.is_active for job in find_jobs(sweep).values())


def prepare_again(trial: Trial, run: TrainConfig, run_dir: Path, words: Sequence[str]) -> None:
    """Make a trial one that nobody has begun; drop its checkpoints if they are of another config."""
    try:
        check_saved_config(run, run_dir, is_content_compared=False)  # rows of another path are a change here
    except ValueError as change:
        logger.info("%s: starts afresh: %s", trial.name, change)
        trial.rung_values = []
        for name in LEFT_BY_A_RUN:
            path = run_dir / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        forget_steps(run_dir)
    (run_dir / "result.json").unlink(missing_ok=True)
    write_run(run, words)
    trial.state, trial.is_waiting, trial.is_cancelled = WAITING, True, False
    trial.process = trial.result = trial.exit_code = trial.job = trial.job_state = None


def cancel(config: SweepCommandConfig) -> None:
    """Stop running trials, which save a checkpoint, and take the waiting ones out."""
    folder = Path(config.sweep_dir)
    with changed_sweep(folder) as sweep:
        if sweep.cluster == HYDRA:
            raise ValueError(f"sweep cancel: train -m runs {folder}; Ctrl-C in its terminal stops it")
        look(sweep, folder, config.gone)
        chosen = [sweep.trial(name) for name in config.trials] or sweep.trials
        stopped = [trial for trial in chosen if trial.state in (WAITING, RUNNING)]
        afar = [trial for trial in stopped if trial.process is not None and not trial.process.is_here]
        if afar:
            raise ValueError(
                f"sweep cancel: {afar[0].name} runs on {sweep.other_machines()}: cancel there, or say gone=NAME "
                "if that machine is no more"
            )
        for trial in stopped:
            trial.is_cancelled, trial.is_waiting = True, False
        if not config.trials:
            sweep.count = len(sweep.trials)
    if sweep.has_slots and config.trials:
        for trial in stopped:  # the slot goes on with another
            if trial.job is not None:
                (folder / trial.name / LEAVE).touch()
    elif sweep.arrays:
        cluster = cluster_of(sweep)
        kept = {trial.job for trial in sweep.trials if trial not in stopped and trial.state in (WAITING, RUNNING)}
        for trial in stopped:
            # Where others train in the same task, or no task can be ended alone, a trial leaves at its next step.
            if trial.job in kept or not cluster.cancels_tasks:
                (folder / trial.name / LEAVE).touch()
            if trial.job is not None and trial.job not in kept and not cluster.cancels_tasks:
                (task_folder(sweep, folder, trial.job) / LEAVE).touch()
        jobs = {trial.job for trial in stopped if trial.job is not None} - kept
        if not config.trials or jobs:
            cluster.cancel(sorted(job for job in jobs if job is not None) if config.trials else sweep.arrays)
    for trial in stopped:
        end(trial, sweep, folder)
    logger.info("%s: %d trials cancelled", folder, len(stopped))


def table(config: SweepCommandConfig) -> None:
    """Print the results, the best first; write them to a file of the kind its name says."""
    folder = Path(config.sweep_dir)
    output = Path(config.output_path) if config.output_path is not None else None
    if output is not None and output.suffix not in (".csv", ".json", ".html", ".svg"):
        raise ValueError(f"output_path={output}: must end in .csv, .json, .html or .svg")
    sweep = seen(config)
    rows = table_rows(sweep, config.sort or sweep.metric)
    print_trials(rows, metrics_shown(sweep, config.sort))
    if (best := best_trial(sweep)) is not None:
        print(f"best {sweep.metric.removeprefix('-')}: {best[1]:.6g} of {best[0]}")
    for doubt in doubts(sweep):
        print(doubt)
    if SEED in sweep.swept_keys:
        print_groups(sweep)
    if (said := sentence(sweep)) is not None:
        print(said)
        if (cut := cut_sentence(sweep, folder, config.sweep_dir.rstrip("/"))) is not None:
            print(cut)
        print(f"next: {next_command(sweep, config.sweep_dir.rstrip('/'))}")
    if output is None:
        return
    cells = heat_map(sweep)
    picture = svg_text(cells) if cells is not None else None
    if cells is not None and cells.best_over and output.suffix in (".svg", ".html"):
        logger.info("a cell of the heat map is the best over %s", cells.best_over)
    if output.suffix == ".svg" and picture is None:
        raise ValueError(
            f"output_path={output}: a heat map needs two swept keys beside the seed; use .csv, .json or .html"
        )
    texts = {".csv": csv_text, ".json": json_text, ".html": lambda rows: html_text(rows, picture)}
    write_text(output, str(picture) if output.suffix == ".svg" else texts[output.suffix](rows))
    logger.info("wrote %s", output)


def metrics_shown(sweep: Sweep, sort: str | None) -> list[str]:
    """Return the columns by which trials are ranked, where they are none of SHOWN_COLUMNS."""
    asked = [sweep.metric.removeprefix("-"), (sort or "").removeprefix("-")]
    return [name for name in dict.fromkeys(asked) if name and name not in (*SHOWN_COLUMNS, "trial")]


def print_trials(rows: list[dict[str, Any]], metrics: Sequence[str] = ()) -> None:
    """Print a row a trial, with the columns in `metrics` before those of SHOWN_COLUMNS that are numbers."""
    chosen = {name: (name, shown) for name in metrics}
    columns = {"state": SHOWN_COLUMNS["state"]} | chosen | SHOWN_COLUMNS
    cells = [
        (row["trial"], ["-" if row.get(name) is None else written(row[name]) for name, (_, written) in columns.items()])
        for row in rows
    ]
    print_rows("trial", [heading for heading, _ in columns.values()], cells)


def print_groups(sweep: Sweep) -> None:
    """Print what trials that differ in their seed only say together, the best mean first."""
    metric, groups = sweep.metric.removeprefix("-"), groups_of(sweep)
    ordered = best_first(groups, sweep.metric)
    rows = []
    for group in [*ordered, *(group for group in groups if not group.scores)]:
        numbers = (group.mean if group.scores else None, group.spread, *(group.interval or (None, None)))
        rows.append((group.label, (f"{len(group.scores)} of {len(group.names)}", *map(shown, numbers))))
    print_rows("trials", ("seeds", "mean", "spread", "95 % from", "to"), rows, f"{metric} over the seeds")


def ask_for_trial(config: SweepCommandConfig) -> None:
    """Draw the next trial, or give a slot its next one, and print its folder; print nothing where none is left."""
    folder = Path(config.sweep_dir).resolve()
    with changed_sweep(folder) as sweep:
        task = task_of(sweep)
        if sweep.has_slots and task is not None:
            place = turn(sweep, folder, task, config.ended, config.trials, partial(ask, sweep, folder, None))
        else:
            look(sweep, folder)
            place = folder / ask(sweep, folder, task).name
    if place is not None:
        print(place)


VERBS: dict[SweepVerb, Callable[[SweepCommandConfig], None]] = {
    SweepVerb.status: status,
    SweepVerb.cancel: cancel,
    SweepVerb.table: table,
    SweepVerb.ask: ask_for_trial,
}
