"""`train -m sweep.together=N`: a grid's trials in this terminal, those that share a base N at a time in one process."""

import logging
from collections.abc import Sequence
from pathlib import Path

from lightning_peft import distributed
from lightning_peft.command_configs.of_runs import SubmitSweepConfig
from lightning_peft.commands.check_sweep import check_given_once, check_rows, check_trials_differ
from lightning_peft.commands.most_together import most_that_fit
from lightning_peft.commands.plan_sweep import grid
from lightning_peft.commands.together import (
    BY_SIGNAL,
    bases,
    exit_status,
    in_groups,
    note_end,
    say,
    train_together,
)
from lightning_peft.commands.train import train
from lightning_peft.compose import compose_config, read_words
from lightning_peft.config import TrainConfig
from lightning_peft.runs.command import kept_commands, started_by
from lightning_peft.runs.folder import sweep_folder
from lightning_peft.runs.lock import only_writer, refuse_file
from lightning_peft.runs.machine import Machine
from lightning_peft.schemas import trial_name
from lightning_peft.sweeps.foreground import check_same_sweep, enter_trial
from lightning_peft.sweeps.sweep import MANIFEST, Trial

logger = logging.getLogger(__name__)


def sweep_together(words: list[str]) -> tuple[Path, int]:
    """Train the trials of a sweep; return its folder and the exit status of all. `run_dir=X` names the folder.

    Raises ValueError, before anything starts, for a wrong word of any trial; Preempted where a signal ends the sweep.
    """
    own = [word for word in words if word.startswith("sweep.")]
    if others := [word for word in own if not word.startswith("sweep.together=")]:
        raise ValueError(f"{others[0]}: train -m takes sweep.together alone; submit -m takes the others")
    if hydra := [word for word in words if word.startswith(("hydra/", "hydra."))]:
        raise ValueError(f"{hydra[0]}: sweep.together starts the trials itself; leave one of them out")
    if distributed.world_size() > 1:
        raise ValueError("-m under torchrun or srun: every rank would run a sweep of its own; use submit -m")
    options: SubmitSweepConfig = compose_config("submit_sweep", own)
    named = [word for word in words if word.startswith("run_dir=")]
    overrides = read_words([word for word in words if word not in own and not word.startswith("run_dir=")])
    swept = [override for override in overrides if override.is_sweep_override()]
    if not swept:
        raise ValueError("-m: no word sweeps; give several values, as in adapter.rank=4,8, or leave -m out")
    fixed = [str(override.input_line) for override in overrides if not override.is_sweep_override()]
    check_given_once(overrides)
    listed = [Trial(trial_name(",".join(sorted(choice))), choice) for choice in grid(swept)]
    one = compose_config("train", [*fixed, *listed[0].overrides, *named]) if named else None
    folder = sweep_folder(None if one is None else one.run_dir)
    trials = {trial.name: trial.overrides for trial in listed}
    configs: dict[str, TrainConfig] = {
        name: compose_config("train", [*fixed, *choice, f"run_dir={folder / name}"]) for name, choice in trials.items()
    }
    check_trials_differ(listed, [configs[trial.name] for trial in listed])
    for name in configs:
        refuse_file(folder / name, "run_dir")
    swept_words = [str(override.input_line) for override in swept]
    check_same_sweep(folder, swept_words)
    if any(config.dry_run for config in configs.values()):
        return folder, max(train_one(name, config) for name, config in configs.items())
    if not (folder / MANIFEST).is_file():  # trials that have finished ask for no rows
        check_rows(list(configs.values()))
    with only_writer(folder):  # two would take turns at each other's trials
        check_same_sweep(folder, swept_words)
        together, found = options.sweep.together, bases(configs)
        if together == "auto":
            sharing = [config for name, config in configs.items() if found[name] is not None]
            together = most_that_fit(sharing, Machine.here(sharing[0].trainer)) if sharing else 1
        status = 0
        for number, names in enumerate(in_groups(found, together or 1), 1):
            for name in names:
                enter_trial(folder / name, [*fixed, *trials[name]], swept_words)
                with started_by([*fixed, *trials[name], f"run_dir={(folder / name).resolve()}"]):
                    kept_commands(folder / name)
            ended = train_group(names, configs, folder / f"together-{number}.txt")
            for name in names:  # some could not tell the manifest themselves
                note_end(folder / name, ended)
            status = max(status, ended)
        return folder, status


def train_group(names: Sequence[str], configs: dict[str, TrainConfig], list_path: Path) -> int:
    if len(names) == 1:
        return train_one(names[0], configs[names[0]])
    logger.info("%d trials together: %s", len(names), ", ".join(names))
    return train_together([configs[name] for name in names], list_path)


def train_one(name: str, config: TrainConfig) -> int:
    """Train one trial by itself; return the exit status, a wrong input or a failure said."""
    try:
        train(config)
    except SystemExit as left:  # its ranks have said themselves what they failed by
        if type(left) in BY_SIGNAL:  # a signal ends the sweep
            raise
        return int(left.code or 0)
    except Exception as error:
        status = exit_status(error)
        say(name, error, status)
        return status
    return 0
