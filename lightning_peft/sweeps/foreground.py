"""The manifest of `train -m`: the same `sweep.json` that `submit -m` keeps, written by the trials as they begin."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning_peft.cluster.process import this_process
from lightning_peft.sweeps.sweep import MANIFEST, RUNNING, Sweep, Trial, locked, read_sweep, write_sweep

HYDRA = "hydra"
"""`cluster` of a sweep that Hydra's launcher runs: nobody starts its trials again but the command itself."""
METRIC = "validation_loss"


def enter_trial(run_dir: Path, words: Sequence[str], swept: Iterable[str]) -> None:
    """Enter the trial that begins in `run_dir` into the manifest of the folder above it.

    `words` are all its overrides, `swept` the words of the sweep that hold several values. A trial that is there
    already counts one more attempt.
    """
    folder = run_dir.parent
    swept = list(swept)
    keys = {word.partition("=")[0].lstrip("+") for word in swept}
    own = [word for word in words if word.partition("=")[0].lstrip("+") in keys]
    with locked(folder):
        if (folder / MANIFEST).is_file():
            sweep = read_sweep(folder)
        else:
            shared = [word.lstrip("+") for word in words if word not in own and not word.startswith("run_dir=")]
            sweep = Sweep(shared, swept, HYDRA, METRIC, directory=str(Path.cwd()))
        trial = next((trial for trial in sweep.trials if trial.name == run_dir.name), None)
        if trial is None:
            trial = Trial(run_dir.name, own)
            sweep.trials.append(trial)
        trial.state, trial.is_waiting, trial.process = RUNNING, False, this_process()
        trial.attempts += 1
        sweep.count = len(sweep.trials)
        write_sweep(sweep, folder)
