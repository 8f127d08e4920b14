"""Metrics by name, as `validation.metrics` gives them: of a task, or a function of one's own."""

import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_peft.data.conversation import Conversation
from lightning_peft.tasks.registry import TASKS
from lightning_peft.tasks.task import Task, TaskRow

OPTION = "validation.metrics"
"""The option that names metrics, unless a caller says another."""
MAX_NEW_TOKENS = 64
"""Longest answer where neither the data's task nor an option says one."""


SMALL_IS_GOOD = ("train_loss", "validation_cross_entropy", "validation_divergence", "seconds", "peak_memory_gib")
LARGE_IS_GOOD = ("tokens_per_second", "validation_rewards/accuracy", "validation_rewards/margin")
"""Numbers of a result that no task computes, by what is good."""
TAKEN = (
    # These are columns of metrics.csv.
    "step", "loss", "grad_norm", "lr", "tokens", "total_tokens", "supervised_tokens", "epoch", "step_seconds", "mfu",
    "supervised_tokens_per_second", "rank", "alpha", "penalty", "kl", "kl_per_token", "cross_entropy", "divergence",
    "router_load", "router_entropy",
    # These are keys of result.json.
    "status", "end", "steps", "train_loss", "metrics", "data", "content", "trainable_parameters", "total_parameters",
    "tokens_per_second", "peak_memory_gib", "device", "warnings", "stopped_early", "diverged", "seconds",
    "device_hours", "versions", "rollbacks", "lr_factor", "steps_left_out",
    # These are columns of a sweep's table.
    "trial", "state", "attempts", "exit_code", "seeds",
)  # fmt: skip
"""Names that a run or a sweep uses for something else than a metric, like those that begin with validation_."""


@dataclass(frozen=True)
class Scorer:
    """The computation of one entry of `validation.metrics`."""

    names: tuple[str, ...]
    """The metrics that the scorer is asked for."""
    score: Callable[[list[TaskRow], list[str]], dict[str, float]]
    columns: tuple[str, ...] = ()
    """Columns that rows need beside `prompt` and `completion`."""
    max_new_tokens: int = MAX_NEW_TOKENS


def names_of_metrics(entries: Sequence[str], task: str) -> list[str]:
    """Name the metrics that the entries of `validation.metrics` compute on rows of `data.task`.

    Raises ValueError for an entry that names no metric, no task and no function, for two that name the same, and for
    one that a run has another number by; imports nothing.
    """
    names = [name for entry in entries for name in _names(entry, task, OPTION)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{OPTION}: {twice[0]} is named twice")
    if taken := next((name for name in names if name in TAKEN or name.startswith("validation_")), None):
        entry = next(entry for entry in entries if taken in _names(entry, task, OPTION))
        raise ValueError(f"{OPTION}={entry}: {taken} is the name of another number of a run; rename the function")
    return names


def _names(entry: str, task: str, option: str) -> tuple[str, ...]:
    if ":" in entry:
        module, _, function = entry.partition(":")
        if not (function.isidentifier() and all(part.isidentifier() for part in module.split("."))):
            raise ValueError(f"{option}={entry}: must be module:function, as in my_metrics:rouge")
        return (function,)
    if entry in TASKS and TASKS[entry].metric_names:
        return TASKS[entry].metric_names
    if task_of_metric(entry, task) is None:
        known = dict.fromkeys(name for each in (TASKS[task], *TASKS.values()) for name in each.metric_names)
        raise ValueError(
            f"{option}={entry}: no such metric; choose one of {', '.join(known)}, a task's name for all of "
            "its metrics, or module:function for one of your own"
        )
    return (entry,)


def task_of_metric(name: str, task: str) -> Task | None:
    """Return the task that computes a metric, the data's own first; None where none does."""
    return next((each for each in (TASKS[task], *TASKS.values()) if name in each.metric_names), None)


def check_direction(option: str, metric: str) -> None:
    """Raise ValueError for a known metric whose sign says the opposite of what is good.

    `metric` is a name whose value is to be small, or to be large with a minus sign before it; `option` says it.
    """
    name = metric.removeprefix("-")
    owner = next((task for task in TASKS.values() if name in task.metric_names), None)
    is_loss = name.partition("/")[0] == "validation_loss"  # over all rows, or a source of a mixture
    if owner is None and not is_loss and name not in (*SMALL_IS_GOOD, *LARGE_IS_GOOD):
        return
    is_small_good = name in owner.small_is_good if owner is not None else name not in LARGE_IS_GOOD
    if is_small_good == metric.startswith("-"):
        right = name if is_small_good else f"-{name}"
        good = "small" if is_small_good else "large"
        raise ValueError(f"{option}={metric}: a {good} {name} is good; write {option}={right}")


def scorers_of(
    entries: Sequence[str], task: str, columns: Sequence[str] | None = None, option: str = OPTION
) -> list[Scorer]:
    """Find what computes the entries of `validation.metrics`, imported where it is one's own.

    `columns` are those of the rows. Raises ValueError for an entry that cannot be computed, as on rows without the
    columns that it needs.
    """
    scorers = [_scorer(entry, task, option) for entry in entries]
    for entry, scorer in zip(entries, scorers, strict=True):
        missing = [name for name in scorer.columns if columns is not None and name not in columns]
        if missing:
            raise ValueError(f"{option}={entry}: needs the columns {', '.join(missing)}, which the rows lack")
    return scorers


def _scorer(entry: str, task: str, option: str) -> Scorer:
    names = _names(entry, task, option)
    if ":" in entry:
        return Scorer(names, own_metric(entry, option), max_new_tokens=TASKS[task].max_new_tokens or MAX_NEW_TOKENS)
    owner = TASKS[entry] if entry in TASKS else task_of_metric(entry, task)
    assert owner is not None, "its names were found"
    return Scorer(names, owner.score, owner.columns, owner.max_new_tokens)


def own_metric(entry: str, option: str = OPTION) -> Callable[[list[TaskRow], list[str]], dict[str, float]]:
    """Import module:function, which takes rows and answers and returns one number. Raises ValueError."""
    module, _, name = entry.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{option}={entry}: cannot be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"{option}={entry}: is no function")
    try:
        inspect.signature(function).bind([], [])
    except TypeError as error:
        raise ValueError(f"{option}={entry}: must take the rows and their answers: {error}") from error
    except ValueError:
        pass  # a function of C says nothing of its arguments

    def score(rows: list[TaskRow], answers: list[str]) -> dict[str, float]:
        try:
            value = function(rows, answers)
        except Exception as error:
            raise ValueError(
                f"{option}={entry}: failed on {len(rows)} rows with {type(error).__name__}: {error}; "
                "LIGHTNING_PEFT_TRACEBACK=1 shows where"
            ) from error
        try:
            return {name: float(value)}
        except (TypeError, ValueError) as error:
            raise ValueError(f"{option}={entry}: must return one number, got {value!r}") from error

    return score


def scores_of(scorers: Sequence[Scorer], rows: list[TaskRow], answers: list[str]) -> dict[str, float]:
    """Compute every metric that is asked for, once a function; one that these rows do not have is nan."""
    computed: dict[Callable[[list[TaskRow], list[str]], dict[str, float]], dict[str, float]] = {}
    found: dict[str, float] = {}
    for scorer in scorers:
        if scorer.score not in computed:
            computed[scorer.score] = scorer.score(rows, answers)
        found |= {name: computed[scorer.score].get(name, math.nan) for name in scorer.names}
    return found


def with_answer(row: TaskRow, messages: Conversation, place: int) -> TaskRow:
    """Return the row with answer `place` and the question before that answer under the names that tasks read."""
    asked = [message.content for message in messages[:place] if message.role == "user"]
    return row | {"prompt": asked[-1] if asked else "", "completion": messages[place].content}


def spread(count: int, total: int) -> list[int]:
    """Return the indices of `count` places evenly spaced over `total`, all of them where there are no more."""
    count = min(count, total)
    return [index * total // count for index in range(count)]
