"""The behaviour that all loggers of a run share: one folder, one rank, and failures that never reach the training."""

import importlib.util
import inspect
import logging
import os
import socket
import time
from abc import abstractmethod
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import yaml
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

logger = logging.getLogger(__name__)


class RunLogger(Logger):
    """A Lightning logger on rank zero. The first thing that fails is logged and is the last thing tried; samples that
    fail are no more written, and the rest goes on. A subclass overrides the `write_*` methods it has a place for.
    """

    needs: tuple[str, str] | None = None
    """Our extra that brings its package, and what that is imported as; None for one that is there."""

    def __init__(self, run_dir: str):
        super().__init__()
        self.check_installed()
        self.run_dir = Path(run_dir)
        self.failed = False
        self.samples_failed = False

    @classmethod
    def check_installed(cls) -> None:
        """Raise ValueError with the extra to install where the package is not there, without importing it."""
        if cls.needs is not None and importlib.util.find_spec(cls.needs[1]) is None:
            extra = cls.needs[0]
            raise ValueError(f"logger={extra}: not installed; pip install 'lightning-peft[{extra}]'")

    @classmethod
    def check_arguments(cls, key: str, arguments: Mapping[str, Any]) -> None:
        """Raise ValueError for arguments of the node `key` that its service does not take, whatever the signature."""

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Log the resolved config of the run, nested plain values."""
        self._try(self.write_config, dict(vars(params) if isinstance(params, Namespace) else params))

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log scalars after `step` optimiser steps."""
        self._try(self.write_metrics, metrics, step or 0)

    @rank_zero_only
    def log_samples(self, columns: list[str], rows: list[list[Any]], step: int) -> None:
        """Log prompts and answers, a row each."""
        if self.failed or self.samples_failed:
            return
        try:
            self.write_samples(columns, rows, step)
        except Exception as error:
            self.samples_failed = True
            logger.warning("%s: %s; no more samples are logged there", self.name, failure(error))

    @rank_zero_only
    def start_at(self, step: int) -> None:
        """Note that the run starts, or goes on, after so many optimiser steps."""
        self._try(self.begin, step)

    @rank_zero_only
    def close(self, status: str, adapter: Path) -> None:
        """Note that the run ended as `status`: finished, failed, or a status of `training/preemption.py`.

        `adapter` is its adapter folder if it finished.
        """
        self._try(self.end, status, adapter)

    @rank_zero_only
    def log_alert(self, title: str, text: str) -> None:
        """Log something a person should look at."""
        self._try(self.write_alert, title, text)

    def write_config(self, config: dict[str, Any]) -> None: ...

    @abstractmethod
    def write_metrics(self, metrics: dict[str, float], step: int) -> None: ...

    def write_samples(self, columns: list[str], rows: list[list[Any]], step: int) -> None: ...

    def write_alert(self, title: str, text: str) -> None: ...

    def begin(self, step: int) -> None: ...

    def end(self, status: str, adapter: Path) -> None: ...

    def abandon(self) -> None:
        """Free what a logger that failed still holds."""

    def _try(self, write: Callable[..., None], *arguments: Any) -> None:
        if self.failed:
            return
        try:
            write(*arguments)
        except Exception as error:
            self.failed = True
            logger.warning("%s: %s; nothing more is logged there, training goes on", self.name, failure(error))
            with suppress(Exception):
                self.abandon()


ASKED_OF_LOGGERS = ("log_hyperparams", "log_metrics", "log_graph", "save", "finalize", "after_save_checkpoint")
"""Methods that Lightning and this package call of any logger."""
READ_OF_LOGGERS = ("experiment", "name", "version", "save_dir", "log_dir", "root_dir", "group_separator")
"""Properties that Lightning and its callbacks read of loggers; many connect to their server at `experiment`."""


def failing_alone(given: Logger, key: str) -> Logger:
    """Have a logger that is none of ours fail as ours do: what it raises is logged, and it is asked for nothing more.

    `key` is the option that names it. It is of a subclass of its class afterwards, as callbacks may look for that.
    """
    own = type(given)
    has_failed = False

    def attempt(get: Callable[[], Any], instead: Any) -> Any:
        nonlocal has_failed
        if has_failed:
            return instead
        try:
            return get()
        except Exception as error:
            if not has_failed:  # what it asked of itself may have failed before
                logger.warning("%s: %s; nothing more is logged there, training goes on", key, failure(error))
            has_failed = True
            return instead

    def method(name: str) -> Callable[..., Any]:
        def call(self: Logger, *arguments: Any, **named: Any) -> Any:
            return attempt(lambda: getattr(super(guarded, self), name)(*arguments, **named), None)

        return call

    def read(name: str, found: Any) -> property:
        instead = DummyLogger().experiment if name == "experiment" else None

        def get(self: Logger) -> Any:
            return attempt(lambda: getattr(super(guarded, self), name), instead)

        return property(get, getattr(found, "fset", None), getattr(found, "fdel", None))

    found = {name: inspect.getattr_static(own, name, None) for name in READ_OF_LOGGERS}
    properties = {name: read(name, at) for name, at in found.items() if isinstance(at, property | cached_property)}
    guarded: type = type(own.__name__, (own,), {name: method(name) for name in ASKED_OF_LOGGERS} | properties)
    object.__setattr__(given, "__class__", guarded)
    return given


def failure(error: Exception) -> str:
    return f"{type(error).__name__} ({' '.join(str(error).split()) or 'no message'})"


class TensorBoard(RunLogger):
    """Event files under `<run_dir>/tensorboard`, one a start.

    A row is in its file once it is logged: torch's writer has a thread of its own, which keeps rows for two minutes and
    prints a traceback where the disk is full.
    """

    needs = ("tensorboard", "tensorboard")

    def __init__(self, run_dir: str):
        super().__init__(run_dir)
        self.file: IO[bytes] | None = None

    @property
    def name(self) -> str:
        return "tensorboard"

    def begin(self, step: int) -> None:
        if step:
            # Events past the checkpoint are hidden; the run writes them again.
            self.write("session_log", {"status": "START"}, step + 1)

    def write(self, kind: str, content: Any, step: int) -> None:
        """Append an event of this step, whose field `kind` is `content`. Raises OSError."""
        # The package is an optional extra.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        if self.file is None:  # made at the first use: only rank zero may write the file
            self.file = next_event_file(self.run_dir / "tensorboard").open("ab")
            self.write("file_version", "brain.Event:2", 0)
        event = Event(wall_time=time.time(), step=step, **{kind: content})
        RecordWriter(self.file).write(event.SerializeToString())
        self.file.flush()

    def write_config(self, config: dict[str, Any]) -> None:
        self.write_text("config", "    " + yaml.safe_dump(config, sort_keys=False).replace("\n", "\n    "), 0)

    def write_metrics(self, metrics: dict[str, float], step: int) -> None:
        values = [{"tag": key, "simple_value": float(value)} for key, value in metrics.items()]
        self.write("summary", {"value": values}, step)

    def write_samples(self, columns: list[str], rows: list[list[Any]], step: int) -> None:
        text = "\n\n".join("\n".join(f"{c}: {v}" for c, v in zip(columns, row, strict=True)) for row in rows)
        self.write_text("samples", text, step)

    def write_text(self, tag: str, text: str, step: int) -> None:
        # The functions that torch's writer makes its events by.
        from torch.utils.tensorboard.summary import text as as_summary

        self.write("summary", as_summary(tag, text), step)

    def end(self, status: str, adapter: Path) -> None:
        if self.file is not None:
            self.file.close()

    def abandon(self) -> None:
        self.end("failed", self.run_dir)


def next_event_file(folder: Path) -> Path:
    """Return the path of an event file that TensorBoard reads after those that a folder holds, and make the folder.

    It reads them in the order of their names, which begin with seconds; a clock may have been set back since the last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seconds = [int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.[0-9]*.*")]
    now = max([int(time.time()), *(second + 1 for second in seconds)])
    return folder / f"events.out.tfevents.{now:010}.{socket.gethostname()}.{os.getpid()}"
