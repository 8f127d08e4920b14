"""Go back to the last good checkpoint of a run that diverged, and remember the lower learning rate in its folder."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning_peft.checkpoint.atomic import atomic_file
from lightning_peft.checkpoint.resume import latest_checkpoint, saved_guard, saved_step
from lightning_peft.runs.folder import ROLLBACKS
from lightning_peft.strict_json import json_text
from lightning_peft.tracking.service_record import forget_steps
from lightning_peft.training.config import GuardAction, GuardConfig
from lightning_peft.training.guard import Diverged

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rollback:
    """One time that a run went back."""

    diverged_at: int
    """Optimiser step at which it was noticed."""
    back_to: int
    """Optimiser step of the checkpoint; 0 for the start of the run."""
    lr_factor: float
    """Factor of the learning rate from there on, rollbacks of before included."""
    reason: str


def rollbacks_of(run_dir: Path) -> list[Rollback]:
    """Return the rollbacks of a run, the oldest first."""
    path = run_dir / ROLLBACKS
    try:
        return [Rollback(**entry) for entry in json.loads(path.read_text())] if path.exists() else []
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: damaged ({error}), so the learning rate to go on at is not known; delete it to take the one given"
        ) from error


def write_rollbacks(rollbacks: Sequence[Rollback], run_dir: Path) -> None:
    with atomic_file(run_dir / ROLLBACKS) as path:
        path.write_text(json_text([asdict(rollback) for rollback in rollbacks]))


def taken_along(run_dir: Path, checkpoint: Path | None) -> list[Rollback]:
    """Return the rollbacks behind a start, and say what they do to the learning rate.

    For another folder, whose checkpoint is gone on from here, the rollbacks up to that checkpoint are kept here.
    """
    origin = run_dir if checkpoint is None else checkpoint.resolve().parent.parent
    found = rollbacks_of(origin)
    if checkpoint is not None and origin != run_dir.resolve():
        step = saved_step(checkpoint)
        if found := [rollback for rollback in found if rollback.back_to <= step]:
            run_dir.mkdir(parents=True, exist_ok=True)
            write_rollbacks(found, run_dir)
    if found:
        logger.warning(
            "%s: %d rollbacks so far, the last from step %d to %d: the learning rate is %g times the given one",
            origin / ROLLBACKS, len(found), found[-1].diverged_at, found[-1].back_to, lr_factor_of(found),
        )  # fmt: skip
    return found


def lr_factor_of(rollbacks: Sequence[Rollback]) -> float:
    return rollbacks[-1].lr_factor if rollbacks else 1.0


def can_roll_back(config: GuardConfig, rollbacks: Sequence[Rollback], found: Diverged) -> bool:
    """Return whether the run is to go back once more."""
    is_asked = config.action is GuardAction.rollback and found.can_be_undone
    return is_asked and len(rollbacks) < config.max_rollbacks


def end_of_divergence(config: GuardConfig, rollbacks: Sequence[Rollback], found: Diverged) -> str:
    """Say how a run ends that does not go back."""
    line = f"diverged at step {found.step}: {found.reason}; checkpoints of before stay"
    if not found.can_be_undone:
        return f"{line}. Look at optimizer.lr, the labels of the rows (lightning-peft data) and adapter.target_modules"
    if config.action is GuardAction.rollback:
        return f"{line}, and the guard.max_rollbacks={config.max_rollbacks} rollbacks are used up"
    return (
        f"{line}. A lower optimizer.lr or a longer schedule.warmup_steps helps; guard.action=rollback lowers the rate, "
        "none goes on"
    )


def roll_back(config: GuardConfig, run_dir: Path, step: int, reason: str) -> Path | None:
    """Put newer checkpoints away, note the rate, and return the checkpoint to go on from, None for the run's start.

    A good checkpoint is one behind a step whose loss was not above the guard's bound. Rank zero alone calls it.
    """
    folder = run_dir / "checkpoints"
    while (checkpoint := latest_checkpoint(folder)) is not None and saved_guard(checkpoint).get("above", 0):
        checkpoint.unlink()
    before = rollbacks_of(run_dir)
    back_to = 0 if checkpoint is None else saved_step(checkpoint)
    found = Rollback(step, back_to, lr_factor_of(before) * config.lr_factor, reason)
    write_rollbacks([*before, found], run_dir)
    forget_steps(run_dir, back_to)
    logger.warning(
        "diverged at step %d: %s; rollback %d of guard.max_rollbacks=%d: back to step %d, and on at %g times the "
        "learning rate", step, reason, len(before) + 1, config.max_rollbacks, back_to, found.lr_factor,
    )  # fmt: skip
    return checkpoint
