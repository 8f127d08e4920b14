"""`submit -m`: the words of a sweep become trials with resolved configs in one folder, and that is started."""

import itertools
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.types import Override

from lightning_peft.checkpoint.atomic import atomic_file
from lightning_peft.cluster.registry import CLUSTERS
from lightning_peft.command_configs.of_runs import SubmitSweepConfig
from lightning_peft.commands.check_sweep import (
    check_given_once,
    check_metric,
    check_rows,
    check_scorers,
    check_trials_differ,
    rungs_of,
)
from lightning_peft.commands.submit import for_cluster, nothing_left_if_refused
from lightning_peft.commands.sweep_array import array_work, submit_array
from lightning_peft.compose import SEARCH_PATH, compose_config, read_words
from lightning_peft.config import TrainConfig, as_yaml
from lightning_peft.runs.command import kept_commands, started_by
from lightning_peft.runs.folder import refuse_run
from lightning_peft.runs.lock import new_folder, only_writer, remove_if_empty
from lightning_peft.schemas import trial_name
from lightning_peft.sweeps.change_lock import locked
from lightning_peft.sweeps.local_worker import start_workers
from lightning_peft.sweeps.pruning import RUNG_OPTION, enter_brackets
from lightning_peft.sweeps.search import (
    Dimension,
    OptunaStudy,
    Pruning,
    Search,
    combinations,
    dimension,
    import_optuna,
    random_trials,
    typed_choices,
)
from lightning_peft.sweeps.sweep import (
    ENDED,
    MANIFEST,
    PAUSED,
    Sweep,
    Trial,
    begin,
    score,
    write_sweep,
)
from lightning_peft.tracking.service_record import SERVICES, service_record

logger = logging.getLogger(__name__)

OWN_KEYS = ("sweep", "sweep_dir", "price", "dry_run")
"""First part of the words that speak to the sweep; the others are those of a single `submit` or `train`."""


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Return (the sweep's own words, those of a run); `run_dir` names the sweep's folder, as it does under train -m."""
    # `cluster` is a group of submit, so no config can have it as a plain key.
    renamed = {"run_dir": "sweep_dir", "cluster": "sweep.cluster"}
    parts = [word.partition("=") for word in words]
    folders = [word for word, (key, _, _) in zip(words, parts, strict=True) if key in ("run_dir", "sweep_dir")]
    if len(folders) > 1:
        raise ValueError(f"{' '.join(folders)}: each names the sweep's folder; give one of them")
    words = [renamed.get(key, key) + sign + value for key, sign, value in parts]
    own = [word for word in words if word.lstrip("+").partition("=")[0].partition(".")[0] in OWN_KEYS]
    for override in read_words([word for word in own if word.lstrip("+").startswith("sweep.")]):
        if override.is_sweep_override():
            raise ValueError(f"{override.input_line}: of the sweep itself, so it has one value")
    return own, [word for word in words if word not in own]


def submit_sweep(words: list[str]) -> None:
    """Plan and start a sweep. Raises ValueError, with nothing written, if any trial's config is wrong."""
    own, run_words = split_words(words)
    config: SubmitSweepConfig = compose_config("submit_sweep", own)
    if config.dry_run:
        price_sweep(config, run_words)
        return
    default = Path(f"sweeps/{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    if config.sweep_dir:
        refuse_run(Path(config.sweep_dir), "sweep_dir")
    folder = (Path(config.sweep_dir) if config.sweep_dir else new_folder(default)).resolve()
    try:
        start_sweep(config, run_words, folder)
    finally:
        remove_if_empty(folder)


def estimate_sweep(words: list[str]) -> None:
    """Print what every trial of the sweep takes, as `submit -m dry_run=true` does. Raises ValueError likewise."""
    own, run_words = split_words([word for word in words if word.partition("=")[0] != "dry_run"])
    renamed = [f"price.{word}" if word.startswith("output=") else word for word in run_words]
    price_words = [word for word in renamed if word.startswith("price.")]
    config: SubmitSweepConfig = compose_config("submit_sweep", [*own, *price_words])
    price_sweep(config, [word for word in renamed if word not in price_words])


def price_sweep(config: SubmitSweepConfig, run_words: list[str]) -> None:
    """Print the prices of a sweep that is planned and checked, and not begun."""
    # These import models, tokenizers and rows, which a sweep that is only planned does without.
    from lightning_peft.commands.price_sweep import prices, show_prices

    folder = Path(config.sweep_dir or "sweeps/planned").resolve()
    sweep, runs = planned(config, run_words, folder)
    show_prices(sweep, runs, prices(sweep, runs, config.price), config.price.output)


def planned(
    config: SubmitSweepConfig, run_words: list[str], folder: Path, is_begun: bool = False
) -> tuple[Sweep, list[TrainConfig]]:
    """Return the sweep and the config of each trial, of optuna the one of a draw. Raises ValueError for a wrong config.

    The rows of a sweep that is begun are read, too, where its trials see the files that are seen here.
    """
    sweep = plan(config, run_words)
    # Optuna's trials are drawn later; a wrong word in them is to be found now all the same.
    trials = sweep.trials or draws_of_each_value(sweep)
    runs = [trial_config(sweep, trial, folder) for trial in trials]
    if config.sweep.pruning is not Pruning.none:
        sweep.rungs = rungs_of(config.sweep, runs)
        enter_brackets(sweep, sweep.trials)
        steps = sorted({*sweep.rungs, *(step for run in runs for step in run.validation.at_steps)})
        sweep.words.append(f"{RUNG_OPTION}=[{','.join(map(str, steps))}]")
        runs = [trial_config(sweep, trial, folder) for trial in trials]
    check_trials_differ(trials, runs)
    for run in runs:
        check_metric(sweep.metric, run)
    if config.sweep.together is not None:
        share_bases(sweep, runs, config.sweep.together)
    check_scorers(runs)
    if is_begun:
        resolved = [run if run.cluster is None else for_cluster(run, run.cluster) for run in runs]
        if runs[0].cluster is None or CLUSTERS[runs[0].cluster.name].cluster.shares_files:
            check_rows(resolved, runs[0].cluster)
    return sweep, runs if sweep.trials else runs[:1]


def start_sweep(config: SubmitSweepConfig, run_words: list[str], folder: Path) -> None:
    sweep, runs = planned(config, run_words, folder, is_begun=True)
    if runs[0].cluster is not None:
        kind, work = CLUSTERS[runs[0].cluster.name].cluster, array_work(sweep, sweep.trials, folder, runs[0])
        kind.check(runs[0].cluster, work)
        if runs[0].cluster.dry_run:
            print(kind.text(runs[0].cluster, work), end="")
            return
    with only_writer(folder, "sweep_dir"), nothing_left_if_refused(folder):
        with locked(folder):
            if (folder / MANIFEST).exists():
                raise ValueError(
                    f"sweep_dir={folder}: holds a sweep already: `sweep retry` goes on with it, or name another"
                )
            for run, trial in zip(runs, sweep.trials, strict=False):
                write_run(run, trial_words(sweep, trial, folder))
            write_sweep(sweep, folder)
        start(folder, [trial.name for trial in sweep.trials], runs[0])
    logger.info("%s: %d trials", folder, sweep.count)


def share_bases(sweep: Sweep, runs: Sequence[TrainConfig], together: int | str) -> None:
    """Note which trials can train together, and how many do."""
    # These import models, which a sweep whose trials have processes of their own does without.
    from lightning_peft.commands.most_together import most_that_fit
    from lightning_peft.commands.together import bases
    from lightning_peft.runs.machine import Machine

    cluster = runs[0].cluster
    machine = Machine.here(runs[0].trainer) if cluster is None else Machine.of_cluster(runs[0].trainer, cluster)
    resolved = [run if run.cluster is None else for_cluster(run, run.cluster) for run in runs]
    found = bases({trial.name: run for trial, run in zip(sweep.trials, resolved, strict=True)}, machine)
    for trial in sweep.trials:
        trial.base = found[trial.name]
    if isinstance(together, str):
        sharing = [run for trial, run in zip(sweep.trials, resolved, strict=True) if trial.base is not None]
        processes = (sweep.parallel or 1) if cluster is None else 1
        together = most_that_fit(sharing, machine, processes) if sharing else 1
    sweep.together = together


def start(folder: Path, names: list[str], run: TrainConfig) -> None:
    """Have the trials that wait run, and Optuna's that are to be drawn; `run` says on which cluster."""
    if run.cluster is None:
        start_workers(folder)
    else:
        submit_array(folder, names, run.cluster, run)


def plan(config: SubmitSweepConfig, words: list[str]) -> Sweep:
    """Return the sweep of these words, with every trial that is known now."""
    overrides = parse(words)
    swept = [override for override in overrides if override.is_sweep_override()]
    if not swept:
        raise ValueError("-m: no word sweeps; give several values, as in adapter.rank=4,8, or leave -m out")
    check_given_once(overrides)
    sweep = Sweep(
        words=[str(override.input_line) for override in overrides if not override.is_sweep_override()],
        swept=[str(override.input_line) for override in swept],
        cluster=config.sweep.cluster.name,
        metric=config.sweep.metric,
        search=config.sweep.search.name,
        pruning=config.sweep.pruning.name,
        reduction=config.sweep.reduction,
        budget_gpu_hours=config.sweep.budget_gpu_hours,
        seed=config.sweep.seed,
        parallel=config.sweep.parallel,
        directory=str(Path.cwd()),
    )
    if config.sweep.search is Search.grid:
        add_trials(sweep, grid(swept))
        sweep.count = len(sweep.trials)
        return sweep
    assert config.sweep.trials is not None, "SweepConfig checks it"
    drawn_from = [dimension(override) for override in swept]
    if config.sweep.search is Search.random:
        add_trials(sweep, random_trials(drawn_from, config.sweep.trials, config.sweep.seed))
        sweep.count = len(sweep.trials)
    else:
        import_optuna()
        sweep.count = int(min(config.sweep.trials, combinations(drawn_from)))
    if sweep.count < config.sweep.trials:
        logger.warning("sweep.trials=%d: the swept values have %d combinations, and each is trained once",
                       config.sweep.trials, sweep.count)  # fmt: skip
    return sweep


def parse(words: list[str]) -> list[Override]:
    """Return Hydra's reading of the words of `submit -m`. Raises ValueError for words of other sweepers."""
    overrides = read_words(words)
    for override in overrides:
        if override.is_hydra_override() and override.get_key_element() != SEARCH_PATH:
            raise ValueError(f"{override.input_line}: submit starts its trials itself; Hydra's launchers and sweepers "
                             "are for train -m")  # fmt: skip
        if override.get_key_element().lstrip("+") in ("resume", "dry_run", "config_path"):
            raise ValueError(f"{override.input_line}: not for a sweep; its trials are resumed by `sweep retry`")
    return overrides


def grid(swept: list[Override]) -> list[list[str]]:
    for override in swept:
        if not override.is_discrete_sweep():
            raise ValueError(f"{override.input_line}: an interval has no end of values; add sweep.search=random "
                             "sweep.trials=N, or use range()")  # fmt: skip
    words = [[f"{override.get_key_element()}={value}" for value in typed_choices(override)] for override in swept]
    return [list(trial) for trial in itertools.product(*words)]


def dimensions(sweep: Sweep) -> list[Dimension]:
    return [dimension(override) for override in parse(sweep.swept)]


def add_trials(sweep: Sweep, trials: list[list[str]]) -> list[Trial]:
    """Add trials with folder names of their own, also where two choices differ in special characters only."""
    taken = {trial.name for trial in sweep.trials}
    added = []
    for overrides in trials:
        name = base = trial_name(",".join(overrides))
        copies = 1
        while name in taken:
            copies += 1
            name = f"{base}-{copies}"
        taken.add(name)
        added.append(Trial(name, overrides))
    sweep.trials += added
    return added


def any_draw(sweep: Sweep) -> Trial:
    (overrides,) = random_trials(dimensions(sweep), 1, sweep.seed)
    return Trial("draw", overrides)


def draws_of_each_value(sweep: Sweep) -> list[Trial]:
    """Return a draw, and the same draw with each other choice of a key, or each end of its interval."""
    first = any_draw(sweep)
    trials = [first]
    for place, of in enumerate(dimensions(sweep)):
        others = list(of.choices) or [of.text(of.low), of.text(of.high)]
        if (own := first.overrides[place].partition("=")[2]) in others:
            others.remove(own)
        for value in others:
            words = [*first.overrides[:place], f"{of.key}={value}", *first.overrides[place + 1 :]]
            trials.append(Trial("draw", words))
    return trials


def trial_words(sweep: Sweep, trial: Trial, folder: Path, more: Sequence[str] = ()) -> list[str]:
    """Return the words by which a trial could be started by itself."""
    cluster = [f"cluster={sweep.cluster}"] if sweep.cluster in CLUSTERS else []
    return [*cluster, *sweep.words, *trial.overrides, *more, f"run_dir={folder / trial.name}"]


def trial_config(sweep: Sweep, trial: Trial, folder: Path, more: Sequence[str] = ()) -> TrainConfig:
    """Return the config of a trial, which continues where an earlier attempt left a checkpoint."""
    words = [*trial_words(sweep, trial, folder, more), "resume=auto"]
    if sweep.cluster == "local" and (typed := [word for word in words if word.startswith("cluster.")]):
        raise ValueError(f"{typed[0]}: cluster=local has no such option")
    config = compose_config("train" if sweep.cluster == "local" else "submit", words)
    assert isinstance(config, TrainConfig)
    return config


def write_run(config: TrainConfig, words: Sequence[str]) -> None:
    """Leave `config.yaml` and the trial's own command in the run folder, and the id of its run in each service."""
    is_of_cluster = config.cluster is not None
    if config.cluster is not None:
        config = for_cluster(config, config.cluster)
    assert config.run_dir is not None
    run_dir = Path(config.run_dir)
    with atomic_file(run_dir / "config.yaml") as path:
        path.write_text(as_yaml(config), encoding="utf-8")
    with started_by(words, "submit" if is_of_cluster else "train"):
        kept_commands(run_dir)
    for name in config.logger:
        if name in SERVICES:
            service_record(run_dir, name)


def ask(sweep: Sweep, folder: Path, job: str | None) -> Trial:
    """Add Optuna's next trial to the sweep and return it, after Optuna was told of the trials that ended.

    `job` is the task of the job array that asks; one that asks again, requeued, gets the trial it had.
    """
    for trial in sweep.trials:
        if job is not None and trial.job == job:
            return trial
    if len(sweep.trials) >= sweep.count:
        raise ValueError(f"{folder}: all {sweep.count} trials are drawn")
    study = OptunaStudy(folder, dimensions(sweep), sweep.seed)
    drawn = {t.number: t for t in sweep.trials if t.number is not None and t.state in ENDED}
    study.tell(
        {number: score(sweep, t) for number, t in drawn.items() if not (t.state == PAUSED and t.rung_values)},
        {
            number: {step: v for step, v in zip(sweep.rungs[t.bracket :], t.rung_values, strict=False) if v is not None}
            for number, t in drawn.items()
            if t.state == PAUSED
        },
    )
    number, overrides = study.ask({tuple(t.overrides): score(sweep, t) for t in sweep.trials})
    (trial,) = add_trials(sweep, [overrides])
    trial.number = number
    enter_brackets(sweep, [trial])
    write_run(trial_config(sweep, trial, folder), trial_words(sweep, trial, folder))
    if job is not None:
        begin(trial, folder)
        trial.job = job
    return trial
