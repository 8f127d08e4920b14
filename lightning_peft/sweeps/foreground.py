"""The manifest of `train -m`: the same `sweep.json` that `submit -m` keeps, written by the trials as they begin."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning_peft.cluster.process import LEAVE, this_process
from lightning_peft.sweeps.change_lock import locked
from lightning_peft.sweeps.sweep import (
    FINISHED,
    HYDRA,
    MANIFEST,
    RUNNING,
    Sweep,
    Trial,
    hours_of,
    read_result,
    read_sweep,
    write_sweep,
)

METRIC = "validation_loss"
OF_A_START = ("run_dir", "resume")
"""Keys whose words are of one start, and not of what is trained."""


def check_same_sweep(folder: Path, swept: Sequence[str]) -> None:
    """Raise ValueError where a folder holds another sweep: one that `submit -m` keeps, or one over other keys."""
    if not (folder / MANIFEST).is_file():
        return
    sweep = read_sweep(folder)
    if sweep.cluster != HYDRA:
        raise ValueError(f"run_dir={folder}: holds a sweep of submit -m; sweep retry goes on with it, or name another")
    if {*sweep.swept_keys} != (keys := {_key(word) for word in swept}):
        raise ValueError(
            f"run_dir={folder}: holds a sweep over {', '.join(sweep.swept_keys)}, this one is over "
            f"{', '.join(sorted(keys))}; name another folder"
        )


def enter_trial(run_dir: Path, words: Sequence[str], swept: Iterable[str]) -> None:
    """Enter the trial that begins in `run_dir` into the manifest of the folder above it.

    `words` are all its overrides, `swept` the words of the sweep that hold several values. A trial that is there
    already counts one more attempt.
    """
    folder = run_dir.parent
    keys = [_key(word) for word in swept]
    own = [word for word in words if _key(word) in keys]
    shared = [word.lstrip("+") for word in words if word not in own and _key(word) not in OF_A_START]
    with locked(folder):
        if (folder / MANIFEST).is_file():
            sweep = read_sweep(folder)
        else:
            sweep = Sweep(shared, [], HYDRA, METRIC, directory=str(Path.cwd()))
        trial = next((trial for trial in sweep.trials if trial.name == run_dir.name), None)
        if trial is None:
            trial = Trial(run_dir.name, own)
            sweep.trials.append(trial)
        trial.state, trial.is_waiting, trial.process = RUNNING, False, this_process()
        trial.attempts += 1
        result = read_result(run_dir)
        if result is None or result["status"] != FINISHED:  # one that has finished does not train again
            before = [word for word in sweep.words if _key(word) not in OF_A_START]
            trial.other_words = [word for word in shared if word not in before]
            trial.other_words += [f"without {word}" for word in before if _key(word) not in map(_key, shared)]
            if result is not None and result.get("seconds") != trial.counted_seconds:
                trial.spent_hours += hours_of(result)
                trial.counted_seconds = result.get("seconds")
        (run_dir / LEAVE).unlink(missing_ok=True)  # it is of an earlier start, which did not live to leave
        sweep.count = len(sweep.trials)
        # Another start may add values to those of the first.
        sweep.swept = [f"{key}={','.join(dict.fromkeys(t.values[key] for t in sweep.trials))}" for key in keys]
        write_sweep(sweep, folder)


def leave_trials(folder: Path) -> int:
    """Enter that this process trains no trial of the folder any more; return how many trials have begun."""
    with locked(folder):
        sweep = read_sweep(folder)
        for trial in sweep.trials:
            if trial.process == this_process():
                trial.process = None
        write_sweep(sweep, folder)
    return len(sweep.trials)


def how_to_go_on(run_dir: Path) -> str:
    """Return what goes on with a run that was left, in words: of a trial, what goes on with its sweep."""
    folder = run_dir.parent
    if not (folder / MANIFEST).is_file():
        return f"the same command with run_dir={run_dir} resume=auto goes on from there"
    if read_sweep(folder).cluster == HYDRA:
        return f"the same command with run_dir={folder} resume=auto goes on from there"
    return f"lightning-peft sweep retry {folder} trials=[{run_dir.name}] goes on from there"


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+")
