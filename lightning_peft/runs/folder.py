"""The state of the run in a folder: unused, to be resumed from a checkpoint, or finished."""

import copy
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lightning_peft import distributed
from lightning_peft.cluster.job import TASK
from lightning_peft.compose import compose_config, composed, typed
from lightning_peft.composition_errors import explained
from lightning_peft.config import TrainConfig, plain
from lightning_peft.distributed import LAUNCHER
from lightning_peft.free_options import FREE_TO_CHANGE, NOT_COMPARED
from lightning_peft.optim.schedules import ScheduleKind
from lightning_peft.runs.errors import one_line
from lightning_peft.runs.lock import new_folder, only_writer, refuse_file
from lightning_peft.sweeps.sweep import MANIFEST, read_result

logger = logging.getLogger(__name__)

ROLLBACKS = "rollbacks.json"
"""File in which `runs/rollback.py` remembers a run's rollbacks."""
LEFT_BY_A_RUN = ("checkpoints", "metrics.csv", "result.json", "adapter", "model", ROLLBACKS)
"""Contents of a run folder once something happened in it."""
TOLD_BY_CONTENT = ("data.train_path", "data.validation_path", "data.hub_name", "model.path")
"""Options that may name the same content elsewhere: `check_same_content` compares the rows and the weights."""
_SOURCE = re.compile(r"^data\.sources\.[\w-]+\.")
"""Words before an option of a source of a mixture."""
PATIENCE_SECONDS = {"SLURM_RESTART_COUNT": 120.0, TASK: 120.0, "SLURM_JOB_ID": 15.0}
"""Time that a run waits for the folder where this variable is set: a requeued one for the processes of its last start,
a job for the `submit` that has just handed it over."""


@dataclass(frozen=True)
class RunStart:
    """The way a run begins."""

    checkpoint: Path | None = None
    """Checkpoint to resume from; None starts at step 0."""
    result: dict[str, Any] | None = None
    """The result of a run that is finished already."""


def sweep_folder(named: str | None) -> Path:
    """Return the folder of a `train -m`: the `run_dir` that one of its trials was composed with, else a new one.

    Raises ValueError for the folder of a run.
    """
    if named is None:
        return new_folder(Path(time.strftime("sweeps/%Y-%m-%d_%H-%M-%S")))
    folder = Path(named)
    refuse_run(folder, "run_dir")
    return folder


def starting_config(overrides: list[str]) -> TrainConfig:
    """Compose a run that begins now. A default folder is made here, so that no other start can take its name.

    Raises ValueError as `compose_config` does, and for resume=auto with a folder that is a new one at every start.
    """
    if any(word.startswith("config_path=") for word in overrides):
        return compose_config("train", overrides)
    with explained("train"):
        config = composed("train", overrides)
        if "${now:" not in str(OmegaConf.to_container(config, resolve=False)["run_dir"]):  # type: ignore[index, call-overload]
            return typed(config)
        if config.resume == "auto":
            raise ValueError("resume=auto: give run_dir=FOLDER, the run to go on with; else each start is a new run")
        checked = typed(copy.deepcopy(config))
        if checked.dry_run:
            return checked
        config.run_dir = str(new_folder(Path(checked.run_dir)))
        return typed(config)


@contextmanager
def opened_folder(config: TrainConfig) -> Iterator[RunStart]:
    """Be the only writer of the run's folder and learn how the run starts. Every rank calls it.

    Raises ValueError where another process writes the folder, where it is used and not to be resumed, or where an
    option changed since. A dry run writes nothing and locks nothing. Where this program started the ranks, the process
    that started them holds the lock.
    """
    run_dir = folder_of(config)
    patience = next((seconds for name, seconds in PATIENCE_SECONDS.items() if name in os.environ), 0.0)
    with ExitStack() as stack:

        def lock_and_find() -> RunStart:
            if config.dry_run:
                refuse_file(run_dir, "run_dir")
            elif LAUNCHER not in os.environ:
                stack.enter_context(only_writer(run_dir, patience_seconds=patience))
            return find_start(config, run_dir)

        yield distributed.on_rank_zero(lock_and_find)


def folder_of(config: TrainConfig) -> Path:
    """Return the run's folder; every composed config names one."""
    assert config.run_dir is not None, "the config composes a run_dir"
    return Path(config.run_dir)


def find_start(config: TrainConfig, run_dir: Path) -> RunStart:
    """Decide how a run in this folder starts.

    A folder with nothing but `config.yaml` is one whose ranks have not begun.

    Raises ValueError for a used folder that is not to be resumed, for options that changed since, and for checkpoints
    that cannot be read; OSError where the folder itself cannot.
    """
    # The import is of Lightning, which the verbs of a sweep do without.
    from lightning_peft.checkpoint.resume import latest_checkpoint, verify_checkpoint

    if (run_dir / MANIFEST).exists():
        raise ValueError(f"run_dir={run_dir}: holds a sweep, whose trials are the folders in it; name another folder")
    used = is_used(run_dir)
    if config.resume not in ("never", "auto"):
        path = Path(config.resume)
        if not path.is_file():
            raise ValueError(f"resume={config.resume}: no such checkpoint; use auto, never or a .ckpt file")
        verify_checkpoint(path)
        origin = path.resolve().parent.parent
        if used and origin != run_dir.resolve():
            raise ValueError(f"run_dir={run_dir} holds another run than resume={config.resume}: name a new folder")
        check_saved_config(config, origin)
        check_length(config, origin, path)
        return RunStart(path)
    if not used:
        return RunStart()
    if config.resume == "never":
        raise ValueError(f"run_dir={run_dir} holds a run already: resume=auto continues it, or name another folder")
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    result = finished_result(config, run_dir, checkpoint)
    if checkpoint is None and result is None:
        check_not_finished(run_dir)
        if not config.dry_run:
            forget_rollbacks(config, run_dir)
        return RunStart()
    check_saved_config(config, run_dir)
    if result is None:
        assert checkpoint is not None
        check_length(config, run_dir, checkpoint)
    return RunStart(checkpoint, result)


def is_used(run_dir: Path) -> bool:
    """Return whether a run has left something in a folder."""
    return any((run_dir / name).exists() for name in LEFT_BY_A_RUN)


def refuse_run(folder: Path, key: str) -> None:
    """Raise ValueError for a sweep's folder, named by the option `key`, that is a run's or would stand over a file."""
    refuse_file(folder, key)
    if (folder / "config.yaml").is_file() and is_used(folder):
        raise ValueError(f"{key}={folder}: holds a run; a sweep has a folder of its own, with its trials in it")


def check_not_finished(run_dir: Path) -> None:
    """Raise ValueError for a run that finished at another end, has no checkpoint, and would be written over."""
    result = read_result(run_dir)
    if result is not None and result["status"] == "finished" and has_trained(run_dir):
        raise ValueError(
            f"run_dir={run_dir} holds a run that is finished after {result.get('steps')} steps, and no checkpoint to "
            "go on from: name a new folder"
        )


def forget_rollbacks(config: TrainConfig, run_dir: Path) -> None:
    """Drop the rollbacks of a folder without a checkpoint whose run had other options: this one begins anew."""
    path = run_dir / ROLLBACKS
    if not path.exists():
        return
    try:
        check_saved_config(config, run_dir)
    except ValueError as difference:
        path.unlink()
        logger.warning("%s: dropped, as this run begins anew (%s)", path, difference)


def finished_result(config: TrainConfig, run_dir: Path, checkpoint: Path | None) -> dict[str, Any] | None:
    """Return `result.json` of a run that reached the end it was given, if that is the end it is given now.

    `checkpoint` is what the run goes on from where what it trained is gone.
    """
    result = read_result(run_dir)
    if result is None or result["status"] != "finished":
        return None
    if not has_trained(run_dir):
        goes_on = "begins anew" if checkpoint is None else f"goes on from {checkpoint.name}"
        logger.warning("%s: finished, but what it trained is gone; it %s", run_dir, goes_on)
        return None
    # Results written before they named their end: the config beside them does, unless somebody has edited it since.
    end = result["end"] if "end" in result else end_of(saved_options(run_dir)["trainer"])
    return result if end == end_of(config.trainer) else None


def has_trained(run_dir: Path) -> bool:
    """Return whether what a run trained is in its folder."""
    return any((run_dir / name).is_dir() for name in ("adapter", "model"))


def end_of(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ends a run, as `result.json` records it."""
    return {key: trainer.get(key) for key in ("max_steps", "max_epochs")}


def check_saved_config(config: TrainConfig, run_dir: Path, is_content_compared: bool = True) -> None:
    """Raise ValueError where an option differs from those in the folder's `config.yaml`, and must not.

    With `is_content_compared` an option that names rows or weights may differ: what it names is compared later.
    """
    saved = saved_options(run_dir)
    free = (*FREE_TO_CHANGE, *(TOLD_BY_CONTENT if is_content_compared else ()))
    now = compared(plain(config))
    check_same_config(with_options_since(compared(saved), now, config), now, free)
    before, after = global_batch(saved["trainer"]), global_batch(config.trainer)
    if before != after:
        raise ValueError(
            f"resume: an optimiser step was {before} micro batches over all ranks (devices x num_nodes x "
            f"accumulate_grad_batches), is {after}: set trainer.accumulate_grad_batches so that it stays {before}"
        )


def saved_options(run_dir: Path) -> dict[Any, Any]:
    """Return what the folder's `config.yaml` holds. Raises ValueError where it is missing or damaged."""
    path = run_dir / "config.yaml"
    remedy = (
        "so the checkpoint's options cannot be compared with these; bring it back, or start afresh in a new run_dir"
    )
    try:
        saved = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: missing, {remedy}") from None
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged ({one_line(error)}), {remedy}") from error
    if not isinstance(saved, dict) or "trainer" not in saved:
        raise ValueError(f"{path}: damaged (not the options of a run), {remedy}")
    return saved


def check_length(config: TrainConfig, run_dir: Path, checkpoint: Path) -> None:
    """Raise ValueError for an end before the checkpoint; log one line where a schedule gets another length."""
    # The import is of torch, which a folder that is not resumed does without.
    from lightning_peft.checkpoint.resume import saved_step

    saved = saved_options(run_dir)["trainer"]
    max_steps, step = config.trainer.get("max_steps"), saved_step(checkpoint)
    if max_steps not in (None, -1) and max_steps < step:
        raise ValueError(f"trainer.max_steps={max_steps}: the run is at step {step} already ({checkpoint})")
    for key in ("max_steps", "max_epochs"):
        before, now = saved.get(key), config.trainer.get(key)
        if before != now and config.schedule.kind is not ScheduleKind.constant:
            logger.warning(
                "resume: trainer.%s was %s, is %s: schedule=%s spans the whole run, so from step %d on the learning "
                "rate follows another curve",
                key, before, now, config.schedule.kind.name, step + 1,
            )  # fmt: skip


def check_same_content(start: RunStart, run_dir: Path, content: Mapping[str, str]) -> None:
    """Compare rows and weights, each by its fingerprint, with those of the checkpoint or the finished run.

    Raises ValueError for other training rows or another base. Other validation rows are logged: they change no weight.
    """
    # The import is of Lightning, which a fresh start has by then, and other callers may not need.
    from lightning_peft.checkpoint.lineage import read_lineage
    from lightning_peft.checkpoint.resume import saved_content

    before: Mapping[str, str] = {}
    if start.result is not None:
        folders = [run_dir / name for name in ("adapter", "model") if (run_dir / name).is_dir()]
        lineage = read_lineage(folders[0]) if folders else None
        if lineage is not None:
            before = {"training rows": lineage.data_fingerprint or "", "base weights": lineage.base_fingerprint}
    elif start.checkpoint is not None:
        before = saved_content(start.checkpoint)
    state = "is finished" if start.result is not None else "resumes"
    for what, fingerprint in before.items():
        now = content.get(what, "")
        if not fingerprint or not now or now == fingerprint:
            continue
        line = f"run_dir={run_dir} {state}, and its {what} are others now ({fingerprint[:12]}, then {now[:12]})"
        if what == "validation rows":
            logger.warning("%s: validation losses before and after cannot be compared", line)
            continue
        raise ValueError(f"{line}: bring the same ones back, or start afresh in a new run_dir")


def global_batch(trainer: dict[str, Any]) -> int | None:
    """Return an optimiser step's micro batches over all ranks; None where `trainer.devices` is left to the machine."""
    counts = [trainer.get(key, 1) for key in ("devices", "num_nodes", "accumulate_grad_batches")]
    return math.prod(counts) if all(isinstance(count, int) and count > 0 for count in counts) else None


def compared(config: dict[Any, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in config.items() if key not in NOT_COMPARED}


def with_options_since(saved: dict[str, Any], now: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Add to a saved config the options that the program did not have when it was saved, with the values of now.

    An option is a field of one of our config classes. A key that is missing in an open dictionary, as in `trainer`, was
    never given, and stays missing.
    """
    completed = dict(saved)
    for entry in fields(config):
        if entry.name in NOT_COMPARED or entry.name not in now:
            continue
        part = getattr(config, entry.name)
        if entry.name not in saved:
            completed[entry.name] = now[entry.name]
            logger.info("resume: option %s is newer than the run; it is %s now", entry.name, now[entry.name])
        elif is_dataclass(part) and isinstance(saved[entry.name], dict):
            completed[entry.name] = with_options_since(saved[entry.name], now[entry.name], part)
    return completed


def check_same_config(
    checkpoint_config: Mapping[str, Any], config: Mapping[str, Any], free: tuple[str, ...] = FREE_TO_CHANGE
) -> None:
    """Raise ValueError naming every option that differs between two resolved configs (nested plain mappings).

    Options in `free` may differ.
    """
    before, now = _flatten(checkpoint_config), _flatten(config)
    absent = object()
    changed = [
        f"{key} (was {_show(before, key)}, is {_show(now, key)})"
        for key in sorted(before.keys() | now.keys())
        if not {key, _SOURCE.sub("data.", key)} & set(free) and before.get(key, absent) != now.get(key, absent)
    ]
    if changed:
        raise ValueError(
            f"resume: the checkpoint was made with another config: {', '.join(changed)}; "
            "restore these, or start afresh in a new run_dir"
        )


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _show(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "not set"
