"""Runs one command, or a sweep of it, and turns what goes wrong into one line and an exit status."""

import io
import logging
import math
import os
import select
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from lightning_peft import distributed
from lightning_peft.compose import (
    SEARCH_PATH,
    check_hydra_words,
    compose_config,
    open_words,
    quote_text_values,
    quoted_texts,
    read_words,
    typed,
)
from lightning_peft.ctrl_c import INTERRUPTED, is_caused_by_ctrl_c
from lightning_peft.plugins import imported_by_words
from lightning_peft.runs.command import started_by
from lightning_peft.runs.errors import WrongInput, is_input_error, one_line
from lightning_peft.runs.folder import starting_config, sweep_folder
from lightning_peft.runs.lock import only_writer
from lightning_peft.runs.ranks import WRONG_INPUT, leave_last_words, say_others_are_lost
from lightning_peft.schemas import CONF_DIR, register_schemas
from lightning_peft.sweeps.foreground import check_same_sweep, enter_trial, leave_trials
from lightning_peft.sweeps.search import choices
from lightning_peft.sweeps.sweep import MANIFEST
from lightning_peft.tables import TABLES
from lightning_peft.words import everyday

logger = logging.getLogger(__name__)

DONE, FAILED = 0, 1
HELP, SWEEP = ("-h", "--help"), ("-m", "--multirun")

LIBRARY_NOISE = (
    "'set_vital' is deprecated",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    "The `srun` command is available on your system but is not used",
)
"""Warnings of torchdata and Lightning that a user cannot or need not heed, as `train` starts its ranks itself."""


BY_WORDS = ("sweep", "init", "config", "schema", "completion", "models")
"""Commands that take the words themselves: they belong to two configs, or to none."""


def run_command(command: str, function: Callable[[Any], Any], overrides: list[str]) -> int:
    """Compose, run, and return the exit status. LIGHTNING_PEFT_TRACEBACK=1 shows the origin of a one-line error."""
    set_up_logging()
    if any(word in HELP for word in overrides):
        return show_help(command, [word for word in overrides if word not in HELP])
    sweep = [word for word in overrides if word in SWEEP]
    typed_words = list(overrides)
    try:
        overrides = [*everyday(command, [word for word in overrides if word not in SWEEP]), *sweep]
        if sweep:
            overrides = quoted_texts(overrides)
        if command in BY_WORDS:
            function(overrides)
        elif command == "submit" and sweep:
            from lightning_peft.commands.plan_sweep import submit_sweep

            submit_sweep([word for word in overrides if word not in sweep])
        elif command == "estimate" and sweep:
            from lightning_peft.commands.plan_sweep import estimate_sweep

            estimate_sweep([word for word in overrides if word not in sweep])
        elif sweep and any(word.startswith("sweep.") for word in overrides):
            if command != "train":
                raise ValueError(f"{command} -m: takes no options of a sweep; train -m and submit -m do")
            from lightning_peft.commands.sweep_together import sweep_together

            folder, status = sweep_together([word for word in overrides if word not in sweep])
            show_sweep(folder)
            return status
        elif sweep:
            run_sweep(command, function, [word for word in overrides if word not in sweep])
        elif command == "train" and is_list(overrides):
            from lightning_peft.commands.together import train_listed

            return train_listed(Path(overrides[0].partition("=")[2]))
        elif command == "train":
            with started_by(typed_words):
                function(starting_config(overrides))
        else:
            with started_by(typed_words if command == "submit" else [], command):
                function(compose_config(command, overrides))
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if is_caused_by_ctrl_c(error):
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        if isinstance(error, BrokenPipeError) and is_reader_gone():
            return leave_reader()
        if is_input_error(error):
            return say_what_is_wrong(error)
        if distributed.is_lost_rank(error):
            say_others_are_lost(error)
            return FAILED
        leave_last_words(f"{type(error).__name__}: {one_line(error)}")
        raise
    return DONE


def is_list(words: list[str]) -> bool:
    """Return whether the words name a list of run folders, to be trained together."""
    return len(words) == 1 and words[0].startswith("config_path=") and words[0].endswith(".txt")


def show_help(command: str, words: list[str]) -> int:
    # This imports AST and every method's config, which a command that runs does without.
    from lightning_peft.help import command_help

    try:
        register_schemas()
        print(command_help(command, everyday(command, [word for word in words if word not in SWEEP])), flush=True)
    except BrokenPipeError:
        return leave_reader()
    except ValueError as error:
        return say_what_is_wrong(error)
    return DONE


def is_reader_gone() -> bool:
    """Return whether stdout is a pipe that nobody reads any more, as behind `| head`."""
    poll = select.poll()
    poll.register(1, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def leave_reader() -> int:
    """Send what is still printed nowhere, as nobody reads it, and return the exit status."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return DONE


def say_what_is_wrong(error: Exception) -> int:
    """Print an error that speaks to the user, once for all ranks; return the exit status."""
    if os.environ.get("LIGHTNING_PEFT_TRACEBACK"):
        traceback.print_exception(error)
    rank = distributed.rank()
    if rank == 0:
        print(f"error: {one_line(error)}", file=sys.stderr)
    elif not leave_last_words(one_line(error)):
        print(f"error: rank {rank}: {one_line(error)}", file=sys.stderr)
    return WRONG_INPUT


def run_sweep(command: str, function: Callable[[Any], Any], overrides: list[str]) -> None:
    """Hand the sweep to Hydra's sweeper and launcher; `run_dir=X` names the sweep's folder.

    Every value is composed beforehand, so that a wrong one is found before anything starts.
    """
    folder = [word for word in overrides if word.startswith("run_dir=")]
    words = [word for word in overrides if not word.startswith("run_dir=")]
    if distributed.world_size() > 1:
        raise ValueError("-m under torchrun or srun: every rank would run a sweep of its own; use submit -m")
    first, *others = one_of_each_value(words)
    if not others and not any(is_swept(word) or word.startswith("hydra") for word in words):
        raise ValueError(f"{command} -m: no key has several values; as in {command} -m adapter.rank=4,8")
    one = compose_config(command, [*first, *folder] if command == "train" else first)
    check_one_sweeper(words, one)
    check_hydra_words(command, words)
    runs = [one, *(compose_config(command, trial) for trial in others)]
    words = open_words(imported_by_words(words, TABLES))
    fixed = [word.partition("=")[0].lstrip("+~") for word in words if not is_swept(word)]
    swept = [word for word in words if is_swept(word) and not word.startswith("hydra")]
    with ExitStack() as stack:
        if command == "train" and not one.dry_run and not any(word.startswith("hydra.sweep.dir=") for word in words):
            place = sweep_folder(one.run_dir if folder else None)
            folder = [f"run_dir={place}"]
            stack.enter_context(only_writer(place))
            check_same_sweep(place, swept)
            is_here = not any(word.startswith("hydra/launcher=") for word in words)
            if is_here and not (place / MANIFEST).is_file():  # trials that have finished ask for no rows
                # This imports models and rows, which other commands do without.
                from lightning_peft.commands.check_sweep import check_rows

                check_rows(runs)
        run_trials(command, function, words, fixed, swept, folder)


def run_trials(
    command: str,
    function: Callable[[Any], Any],
    words: list[str],
    fixed: list[str],
    swept: list[str],
    folder: list[str],
) -> None:
    """Have Hydra run the trials of these words, of which `fixed` are the keys that are not swept; show the table.

    `folder` is empty, or the word that names the sweep's folder.
    """
    folders: list[Path] = []
    # Hydra's own logging would put a date and a name before each line, and say run_dir in its grammar.
    words += [f"hydra/{kind}=none" for kind in ("job_logging", "hydra_logging") if f"hydra/{kind}" not in fixed]
    words += [f"hydra.job.config.override_dirname.exclude_keys=[{','.join([*fixed, 'run_dir'])}]"]
    words += [word.replace("run_dir=", "hydra.sweep.dir=", 1) for word in quote_text_values(folder)]

    @hydra.main(config_path=str(CONF_DIR.resolve()), config_name=command, version_base="1.3")
    def job(config: DictConfig) -> Any:
        set_up_logging()  # a launcher's other process has none
        try:
            trial = typed(config)
            values = [word for word in HydraConfig.get().overrides.task if is_of(word, swept)]
            logger.info("trial %d: %s", HydraConfig.get().job.num + 1, " ".join(values))
            if command == "train" and not trial.dry_run and distributed.rank() == 0:
                enter_trial(Path(trial.run_dir), list(HydraConfig.get().overrides.task), swept)
                folders.append(Path(trial.run_dir).parent)
            own = [word.lstrip("+") for word in HydraConfig.get().overrides.task if not word.startswith("run_dir=")]
            with started_by([*own, f"run_dir={trial.run_dir}"] if command == "train" else []):
                return function(trial)
        except (ValueError, OSError) as error:
            if is_input_error(error):
                raise WrongInput(str(error)) from error
            raise

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # else Hydra prints errors itself and exits
    arguments = sys.argv
    sys.argv = [arguments[0], "--multirun", *words, "run_dir=${hydra:runtime.output_dir}"]
    try:
        job()
    finally:
        sys.argv = arguments
        if folder:
            folders.append(Path(folder[0].partition("=")[2]))
        if folders and (folders[0] / MANIFEST).is_file():
            begun = leave_trials(folders[0])
            show_sweep(folders[0])
            if (count := count_trials(words, swept)) is not None and begun < count:
                again = f"the same command with {shlex.quote(f'run_dir={folders[0]}')} resume=auto goes on"
                print(f"{begun} of {count} trials have begun; {again}")


def show_sweep(folder: Path) -> None:
    """Print the table of a sweep that has ended."""
    from lightning_peft.commands.sweep import sweep

    sweep(["table", str(folder)])
    print(f"`{shlex.join(['lightning-peft', 'sweep', 'table', str(folder)])}` shows it again")


def check_one_sweeper(words: list[str], config: Any) -> None:
    """Raise ValueError for a sweeper that chooses as it goes, in one process with trials of several ranks, and for
    an interval that Hydra's own cannot draw from.
    """
    hydra_options = dict(word.partition("=")[::2] for word in words)
    sweeper, launcher = (hydra_options.get(f"hydra/{part}", "basic") for part in ("sweeper", "launcher"))
    intervals = [override.input_line for override in read_words(words) if override.is_interval_sweep()]
    if sweeper == "basic" and intervals:
        raise ValueError(
            f"{intervals[0]}: an interval has no end of values; use range(), or submit -m with sweep.search=random "
            "sweep.trials=N"
        )
    ranks = [f"trainer.{key}={count}" for key in ("devices", "num_nodes") if (count := config.trainer.get(key, 1)) != 1]
    if sweeper != "basic" and launcher == "basic" and ranks:
        raise ValueError(
            f"hydra/sweeper={sweeper} {' '.join(ranks)}: in one process the ranks could be given different trials; "
            "use submit -m sweep.search=optuna, or hydra/launcher=submitit_slurm"
        )


def is_of(word: str, swept: list[str]) -> bool:
    """Return whether a trial's word gives one of the keys that are swept."""
    return word.partition("=")[0].lstrip("+") in (other.partition("=")[0].lstrip("+") for other in swept)


def count_trials(words: list[str], swept: list[str]) -> int | None:
    """Return how many trials the words are of; None where a sweeper chooses as it goes."""
    overrides = read_words(swept)
    if any(word.startswith("hydra/sweeper=") for word in words) or any(o.is_interval_sweep() for o in overrides):
        return None
    return math.prod(len(choices(override)) for override in overrides)


def is_swept(word: str) -> bool:
    return OverridesParser.create().parse_override(word).is_sweep_override()


def first_trial(words: list[str]) -> list[str]:
    """Return the overrides of a sweep's first trial."""
    return one_of_each_value(words)[0]


def one_of_each_value(words: list[str]) -> list[list[str]]:
    """Return the overrides of trials in which every swept value is met, the first of them a sweep's first.

    Words for Hydra alone and values that cannot be enumerated are left out.
    """
    singles: list[list[str]] = []
    for word, override in zip(words, read_words(words), strict=True):
        if override.is_hydra_override() and override.get_key_element() != SEARCH_PATH:
            continue
        if not override.is_sweep_override():
            singles.append([word])
        elif override.is_discrete_sweep():
            singles.append([f"{override.get_key_element()}={value}" for value in choices(override)])
    first = [values[0] for values in singles]
    others = [
        [*first[:place], value, *first[place + 1 :]] for place, values in enumerate(singles) for value in values[1:]
    ]
    return [first, *others]


def ignore_library_noise() -> None:
    for message in LIBRARY_NOISE:
        warnings.filterwarnings("ignore", message)


def set_up_logging() -> None:
    """Log one line a message on stderr, ours from INFO (of rank zero) and others' from WARNING.

    Characters that the terminal's encoding lacks are shown by number: an answer in another script ends no training.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("lightning_peft").setLevel(logging.INFO if distributed.rank() == 0 else logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    ignore_library_noise()
