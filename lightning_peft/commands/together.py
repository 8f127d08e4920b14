"""Trials that train together: which of them can share one process and one base, and their training in groups."""

import hashlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning_peft import distributed
from lightning_peft.adapters.registry import METHODS
from lightning_peft.adapters.segments import change_of_base
from lightning_peft.adapters.targets import find_targets
from lightning_peft.checkpoint.atomic import atomic_file
from lightning_peft.commands.train import train
from lightning_peft.commands.training import prepare_folder
from lightning_peft.compose import compose_config
from lightning_peft.config import TrainConfig, plain
from lightning_peft.distributed import LAUNCHER
from lightning_peft.models.blocks import block_names
from lightning_peft.models.loading import empty_model
from lightning_peft.models.packing_choice import obstacle_to_one_row
from lightning_peft.objectives.sft import SFTConfig
from lightning_peft.runs.errors import is_input_error, one_line
from lightning_peft.runs.folder import folder_of, opened_folder
from lightning_peft.runs.machine import Machine
from lightning_peft.runs.plan import RunPlan, check_ranks_can_start, plan_run
from lightning_peft.runs.ranks import WRONG_INPUT, leave_with_launcher, run_ranks
from lightning_peft.sweeps.place import task_of
from lightning_peft.sweeps.sweep import MANIFEST, changed_sweep, read_sweep
from lightning_peft.tracking.run_log import PRINTED
from lightning_peft.training.config import ActivationCheckpointing, Compilation, GuardAction
from lightning_peft.training.preemption import REASONS, Interrupted, Preempted
from lightning_peft.training.together import Member, MemberOutcome, RunGroup

logger = logging.getLogger(__name__)

FAILED = 1
SHARED = ("model", "quantization", "strategy", "activation_checkpointing", "compile", "device_memory_gib")
"""Options whose values trials that train together share: these make the base, and the way it is run."""
ONE_RUN_LOGGERS = ("comet", "trackio")
"""Loggers whose services keep one run of a process, as far as anybody has tried."""
OF_ALL_TOKENS = "objective.label_smoothing"
"""One more such option, as the cross entropy is taken of all tokens of the trials at once."""
BY_SIGNAL = (Preempted, Interrupted)
"""Exceptions with which a signal to this process ends a training; other kinds of `Preempted` are of one trial."""
OWN_TRAINER_OPTIONS = (
    "max_steps", "max_epochs", "max_time", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm",
    "log_every_n_steps", "enable_progress_bar",
)  # fmt: skip
"""Options of the trainer that each trial has for itself."""
NOT_OF_ONE_TRIAL = {
    "detect_anomaly": "a number of one trial that is not finite would end all",
    "profiler": "it would time what all trials do",
}
"""Options of the trainer that say something about passes, which all trials share."""


def obstacle(config: TrainConfig, plan: RunPlan) -> str:
    """Return why a trial trains by itself, with the option that says so; empty where it can share its base.

    Raises ValueError for target modules that the model has not.
    """
    method, name = METHODS[config.adapter.method], config.adapter.method
    if method.select is not None:
        return f"method={config.method}: chooses modules of the base to train in full"
    if reason := change_of_base(config.adapter):
        return f"method={config.method}: {reason}"
    if config.objective.name != SFTConfig.name:
        return f"objective={config.objective.name}: trials together learn by sft"
    if config.strategy.cpu_offload:
        return "strategy.cpu_offload=true: slices on the host are one trial's; leave it out, as the base is held once"
    if plan.precision.endswith("-mixed"):
        return f"trainer.precision={plan.precision}: use bf16-true or 32-true"
    for option, reason in NOT_OF_ONE_TRIAL.items():
        if config.trainer.get(option):
            return f"trainer.{option}={config.trainer[option]}: {reason}"
    if found := [name for name in ONE_RUN_LOGGERS if name in config.logger]:
        return f"logger={found[0]}: logs one run of a process; use wandb, mlflow, tensorboard or csv"
    if config.guard.action is GuardAction.rollback:
        return "guard.action=rollback: a trial that goes back would hold up the others; use stop or skip"
    if config.compile in (Compilation.blocks, Compilation.full):
        return f"compile={config.compile.name}: passes taken together are not compiled; use auto or none"
    if config.adapter.untie_embeddings or config.model.new_tokens:
        return "adapter.untie_embeddings or model.new_tokens: its embeddings are its own"
    model = empty_model(config.model, plan.weight_dtype)
    if reason := obstacle_to_one_row(model, config.data.max_length):
        return f"model: {reason}"
    blocks = tuple(f"{block}." for block in block_names(model))
    for target in find_targets(model, config.adapter, tuple(method.layers)):
        layer = model.get_submodule(target.name)
        kind = next(adapter for base, adapter in method.layers.items() if isinstance(layer, base))
        if not kind.is_product():
            return f"method={config.method}: {name} is no low-rank product beside its base"
        if target.experts or not target.name.startswith(blocks):
            return f"adapter.target_modules: {target.name} is no linear layer of a block that is fed every token"
    return ""


def shared_options(config: TrainConfig) -> dict[str, Any]:
    """Return the options that are the same for all trials of a group, flat."""
    options = plain(config)
    shared = {f"trainer.{key}": v for key, v in options["trainer"].items() if key not in OWN_TRAINER_OPTIONS}
    for name in SHARED:
        value = options[name]
        shared |= {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    shared.pop("model.label", None)
    assert isinstance(config.objective, SFTConfig), "an obstacle to all others"
    return shared | {OF_ALL_TOKENS: config.objective.label_smoothing}


def bases(configs: Mapping[str, TrainConfig], machine: Machine | None = None) -> dict[str, str | None]:
    """Return for each trial a word that it has in common with those it can train together with.

    The word is None for a trial that has to train by itself. One line says why, and one what keeps trials apart.
    `machine` is where they will run, null this one.
    """
    found: dict[str, str | None] = {}
    first: dict[str, dict[str, Any]] = {}
    for name, config in configs.items():
        if reason := obstacle(config, plan_run(config, machine or Machine.here(config.trainer))):
            logger.info("%s trains by itself: %s", name, reason)
            found[name] = None
            continue
        own = shared_options(config)
        word = hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).hexdigest()[:8]
        if first and word not in first:
            other, options = next((n, first[w]) for n, w in found.items() if w is not None)
            changed = next(key for key in own | options if own.get(key) != options.get(key))
            logger.info("%s trains apart from %s: %s differs", name, other, changed)
        first.setdefault(word, own)
        found[name] = word
    return found


def grouped(configs: Mapping[str, TrainConfig], most: int) -> list[list[str]]:
    """Return the trials, by name, in groups of up to `most` that can train together, in their order."""
    return in_groups(bases(configs), most)


def in_groups(found: Mapping[str, str | None], most: int) -> list[list[str]]:
    """Return trials in groups of up to `most`, in their order; `found` is what `bases` says of them."""
    groups: list[list[str]] = []
    open_groups: dict[str, list[str]] = {}
    for name, base in found.items():
        group = [] if base is None else open_groups.get(base, [])
        if not group:
            groups.append(group)
        group.append(name)
        if base is not None:
            open_groups[base] = group if len(group) < most else []
    return groups


def as_member(config: TrainConfig) -> TrainConfig:
    """Return the config of a trial among others: what checkpointing fits is chosen for a run alone only."""
    if config.activation_checkpointing is not ActivationCheckpointing.auto:
        return config
    logger.info("%s: activation_checkpointing=auto is elementwise among others", folder_of(config).name)
    return replace(config, activation_checkpointing=ActivationCheckpointing.elementwise)


def train_together(configs: Sequence[TrainConfig], list_path: Path) -> int:
    """Train these runs in this process on one base, each as if alone; return the exit status for all of them.

    `list_path` is the file in which ranks find the run folders, one a line. The runs are a group of `grouped`. Every
    run's end is in its own folder; a manifest above it is told as soon as it ends. Raises Preempted where a signal
    ended them all.
    """
    configs = [as_member(config) for config in configs]
    plans = [plan_run(config, Machine.here(config.trainer)) for config in configs]
    plan = plans[0]
    check_ranks_can_start(plan)
    if plan.starts_ranks:
        return with_ranks(configs, plan, list_path)
    if plan.is_rank:
        leave_with_launcher()
    has_joined = plan.is_rank and distributed.connect(plan.accelerator)
    names = [folder_of(config).name for config in configs]
    group, statuses = RunGroup(names), [0] * len(names)
    if any(config.callbacks for config in configs):
        logger.info("callbacks: hooks on a model's layers see validations only, as one model takes all training passes")

    def ended(number: int, outcome: MemberOutcome[dict[str, Any]]) -> None:
        status = statuses[number] = exit_status(outcome.error)  # its traceback, which tells, is let go of behind this
        if distributed.rank() == 0:
            say(names[number], outcome.error, status)
            note_end(folder_of(configs[number]), status)

    with logs_of_members(configs):
        outcomes = group.run([partial(work, config) for config in configs], ended)
    left = [outcome.error for outcome in outcomes if isinstance(outcome.error, Preempted)]
    if has_joined:
        distributed.disconnect()
    if group.signals.received is not None and left:
        raise max(left, key=lambda reason: REASONS.index(type(reason)) if type(reason) in REASONS else -1)
    return status_of_all([folder_of(config) for config in configs], statuses)


def status_of_all(run_dirs: Sequence[Path], statuses: Sequence[int]) -> int:
    """Return the exit status of trials that shared a process: 75 where one is to be gone on with, which a job is
    requeued for and nothing else; else the largest. A cancelled trial is not gone on with."""
    left = [run_dir for run_dir, status in zip(run_dirs, statuses, strict=True) if status == Preempted.exit_status]
    if left and wanted(left):
        return Preempted.exit_status
    return max((status for status in statuses if status != Preempted.exit_status), default=0)


def train_listed(path: Path) -> int:
    """Train the runs whose folders a file lists, one a line; return the exit status.

    A trial that was cancelled, or whose end the sweep knows, is left out when a job goes on. Raises ValueError where
    there is no such file.
    """
    try:
        run_dirs = [Path(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except OSError as error:
        raise ValueError(f"config_path={path}: cannot be read ({error.strerror})") from error
    configs = [compose_config("train", [f"config_path={run_dir / 'config.yaml'}"]) for run_dir in wanted(run_dirs)]
    if not configs:
        logger.info("%s: nothing left to train", path)
        return 0
    if len(configs) == 1:
        train(configs[0])
        return 0
    return train_together(configs, path)


def wanted(run_dirs: Sequence[Path]) -> list[Path]:
    """Return the folders of trials that their sweep has neither cancelled nor seen end in this job."""
    found = []
    for run_dir in run_dirs:
        sweep = read_sweep(run_dir.parent) if (run_dir.parent / MANIFEST).is_file() else None
        trial = next((t for t in sweep.trials if t.name == run_dir.name), None) if sweep is not None else None
        if sweep is None or trial is None:
            found.append(run_dir)
        elif trial.is_cancelled:
            logger.info("%s: cancelled, left out", run_dir.name)
        elif task_of(sweep) is not None and trial.job is None:
            logger.info("%s: has ended before this start of the job, left out", run_dir.name)
        else:
            found.append(run_dir)
    return found


def work(config: TrainConfig, member: Member) -> dict[str, Any]:
    return train(config, member)


def with_ranks(configs: Sequence[TrainConfig], plan: RunPlan, list_path: Path) -> int:
    """Start the ranks of a group, each of which trains all its runs, and wait for them. Return the exit status.

    Raises Preempted or Interrupted where a signal ended the ranks.
    """
    with ExitStack() as stack:
        for config in configs:
            if stack.enter_context(opened_folder(config)).result is None:
                prepare_folder(config, folder_of(config))
        write_list(list_path, [folder_of(config) for config in configs])
        try:
            run_ranks(list_path, plan.devices)
        except SystemExit as left:
            if type(left) in BY_SIGNAL:
                raise
            return int(left.code or 0)
    return 0


def write_list(path: Path, run_dirs: Sequence[Path]) -> None:
    """Write the file that `train config_path=FILE.txt` trains: run folders, one a line."""
    with atomic_file(path) as partial_path:
        partial_path.write_text("".join(f"{run_dir.resolve()}\n" for run_dir in run_dirs), encoding="utf-8")


def exit_status(error: BaseException | None) -> int:
    """Return the exit status of a lone run that ends by this error."""
    if error is None:
        return 0
    if isinstance(error, Preempted):
        return error.exit_status
    return WRONG_INPUT if is_input_error(error) else FAILED


def say(name: str, error: BaseException | None, status: int) -> None:
    """Log how a run ended that did not end well."""
    if status == WRONG_INPUT and error is not None:
        print(f"error: {name}: {one_line(error)}", file=sys.stderr)
    elif status == FAILED and error is not None:
        traceback.print_exception(error)
        print(f"error: {name}: {type(error).__name__}: {one_line(error)}; the others go on", file=sys.stderr)
    else:
        logger.info("%s has ended%s", name, f" with status {status}" if status else "")


def note_end(run_dir: Path, status: int) -> None:
    """Tell the manifest of the sweep that a run stands in that it has ended, while its process goes on."""
    folder = run_dir.parent
    if not (folder / MANIFEST).is_file():
        return
    own = (os.getpid(), int(os.environ.get(LAUNCHER, "0")))  # a rank is not the process that the sweep knows
    with changed_sweep(folder) as sweep:
        job = task_of(sweep)
        for trial in sweep.trials:
            if trial.name != run_dir.name:
                continue
            if trial.process is not None and trial.process.pid in own:
                trial.process, trial.exit_code = None, status
            elif trial.job is not None and trial.job == job and status not in (0, Preempted.exit_status):
                trial.job, trial.exit_code = None, status


class OfThread(logging.Filter):
    """A filter that lets the records of one member's thread through."""

    def __init__(self, name: str):
        super().__init__()
        self.thread = name

    def filter(self, record: logging.LogRecord) -> bool:
        return record.threadName == self.thread


class OfOthers(logging.Filter):
    """A filter that lets through what no member says, what the first one says, and every warning."""

    def __init__(self, names: Sequence[str]):
        super().__init__()
        self.names = names

    def filter(self, record: logging.LogRecord) -> bool:
        is_shown = record.levelno >= logging.WARNING or record.threadName not in self.names[1:]
        return is_shown


class WithName(logging.Formatter):
    """A formatter that writes a record as another one does, behind the name of the record's member."""

    def __init__(self, names: Sequence[str], formatter: logging.Formatter | None):
        super().__init__()
        self.names, self.formatter = names, formatter or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        text = self.formatter.format(record)
        return f"{record.threadName}: {text}" if record.threadName in self.names else text


@contextmanager
def logs_of_members(configs: Sequence[TrainConfig]) -> Iterator[None]:
    """Keep each member's log in its folder, and on stderr the first one's and all warnings."""
    root = logging.getLogger()
    names = [folder_of(config).name for config in configs]
    others = OfOthers(names)
    handlers = [(handler, handler.formatter) for handler in root.handlers]
    for handler, formatter in handlers:
        handler.addFilter(others)
        handler.setFormatter(WithName(names, formatter))
    files = []
    for config, name in zip(configs, names, strict=True):
        folder_of(config).mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(folder_of(config) / PRINTED, encoding="utf-8", delay=True)
        file.addFilter(OfThread(name))
        files.append(file)
        root.addHandler(file)
    try:
        yield
    finally:
        for file in files:
            root.removeHandler(file)
            file.close()
        for handler, formatter in handlers:
            handler.removeFilter(others)
            handler.setFormatter(formatter)
