"""Weights & Biases: one run for a run folder, over every start of it."""

import inspect
import json
import logging
import os
import time
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from weakref import WeakSet

from lightning_peft.checkpoint.lineage import FILE_NAME as LINEAGE
from lightning_peft.tracking.charts import STEP, charts, summary_of, sweep_name
from lightning_peft.tracking.git_state import git_state
from lightning_peft.tracking.loggers import RunLogger
from lightning_peft.tracking.metrics_csv import MetricsCSV
from lightning_peft.tracking.run_log import PRINTED, RunLog
from lightning_peft.tracking.service_record import service_record, write_record

logger = logging.getLogger(__name__)

MODES = ("online", "offline", "disabled")
MODES_OF_VARIABLE = (*MODES, "dryrun", "run", "shared")
"""Values of WANDB_MODE; dryrun is offline, run is online."""
NOT_IN_PROJECTS = "/\\#?%:"
"""Characters that W&B refuses in the name of a project."""
NOT_IN_IDS = ":;,#?/'"
"""Characters that W&B refuses in the id of a run."""
SERVER_SECONDS = 30
"""Time that the start and the end of a run wait for a server."""
SETTINGS: dict[str, Any] = {
    "init_timeout": SERVER_SECONDS,
    "finish_timeout": SERVER_SECONDS,
    # A wrapped console takes down every print with it when its service is gone or the disk is full.
    "console": "off",
    "quiet": True,
}
CONSOLE = "output.log"
"""The file of a run that W&B shows as its console."""
DATA_DIR = "WANDB_DATA_DIR"
PROJECT = "lightning-peft"
VARIABLES = {
    "project": "WANDB_PROJECT",
    "group": "WANDB_RUN_GROUP",
    "job_type": "WANDB_JOB_TYPE",
    "tags": "WANDB_TAGS",
    "name": "WANDB_NAME",
}
FLUSH_SECONDS = 30
"""After so long a row is in W&B's file or on its server; its service keeps the latest 15 seconds in memory."""


def has_wandb_key() -> bool:
    """Return whether a run could log in without asking: a key in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC") or os.path.expanduser("~/.netrc"))  # a user without a home has a ~ here
    try:
        return "wandb" in netrc.read_text(encoding="utf-8")
    except OSError:
        return False


def is_of_agent() -> bool:
    """Return whether `wandb agent` has started this process: W&B takes id and project of the run from it alone."""
    return bool(os.environ.get("WANDB_SWEEP_ID") and os.environ.get("WANDB_RUN_ID"))


def id_of_user(run_dir: Path) -> str | None:
    """Return the id that WANDB_RUN_ID gives the run, an agent's or a person's; None without one.

    The trials of a sweep of ours have ids of their own: with one id they would write over each other.
    """
    given = os.environ.get("WANDB_RUN_ID") or None
    if given is None or is_of_agent() or (sweep := sweep_name(run_dir)) is None:
        return given
    logger.warning("wandb: WANDB_RUN_ID=%s is of one run; each trial of %s has an id of its own", given, sweep)
    return None


def mode_of_user() -> str:
    """Return what W&B's variables say of where to log to, else online where there is a key."""
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        return "disabled"
    return os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")


OPEN: "WeakSet[WandbRun]" = WeakSet()
"""The runs of this process that log: several where trials train together."""
SET_HERE: dict[str, str] = {}
"""Environment variables that the first such run has set."""


def end_service() -> None:
    """End W&B's service for this process, unless a run still logs through it."""
    import wandb

    if not OPEN:
        wandb.teardown()


class WandbRun(RunLogger):
    """A run online where there is a key and a server that answers, else in `<run_dir>/wandb` for a later `wandb sync`.

    WANDB_MODE, WANDB_DISABLED, WANDB_DIR and WANDB_RUN_ID are heeded, the last one outside of our own sweeps.

    The run's id stands in `<run_dir>/wandb_run.json`, so every start of a folder continues one run. `options` go to
    `wandb.init`. A null is taken from W&B's environment variable (WANDB_PROJECT, WANDB_RUN_GROUP, WANDB_JOB_TYPE,
    WANDB_TAGS, WANDB_NAME), else the project is PROJECT, the group the sweep's name, the tags `default_tags`, and the
    name that of the run's folder.
    """

    def __init__(
        self,
        run_dir: str,
        project: str | None = None,
        mode: str = "auto",
        group: str | None = None,
        job_type: str | None = None,
        tags: list[str] | None = None,
        default_tags: list[str] | None = None,
        **options: Any,
    ):
        super().__init__(run_dir)
        self.check_arguments("logger.wandb", {"mode": mode, **options})
        if mode == "auto":
            mode = mode_of_user()
            if mode == "offline":
                logger.info("wandb: logging offline to %s/wandb (wandb sync uploads it)", self.place)
        self.mode: Any = mode  # wandb names a Literal
        given = {"project": project, "group": group, "job_type": job_type, "tags": tags, "name": None, **options}
        defaults = {
            "project": PROJECT,
            "group": sweep_name(self.run_dir),
            "job_type": "train",
            "tags": default_tags or [],
            "name": self.run_dir.resolve().name,
        }
        # wandb itself reads them once a process, when the first run of it starts.
        variables: dict[str, Any] = {key: os.environ.get(variable) or None for key, variable in VARIABLES.items()}
        if variables["tags"] is not None:
            variables["tags"] = variables["tags"].split(",")
        self.options: dict[str, Any] = defaults
        for more in (variables, given):
            self.options = self.options | {key: value for key, value in more.items() if value is not None}
        self.run: Any = None
        self.log: RunLog | None = None
        self.written_step = 0
        self.logged = (time.monotonic(), 0)
        """Time at which the record last went forward, and the step that rows had been logged to then."""

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def place(self) -> str:
        """Return the folder that W&B makes its own one in."""
        return os.environ.get("WANDB_DIR") or str(self.run_dir)

    @classmethod
    def check_arguments(cls, key: str, arguments: Mapping[str, Any]) -> None:
        # wandb takes a second to import.
        import wandb

        if (mode := arguments.get("mode", "auto")) not in ("auto", *MODES):
            raise ValueError(f"{key}.mode={mode!r}: must be auto, online, offline or disabled")
        known = {*inspect.signature(wandb.init).parameters, *inspect.signature(cls).parameters} - {"options"}
        if unknown := [name for name in arguments if name not in known]:
            near = get_close_matches(unknown[0], known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{key}.{unknown[0]}: wandb.init has no such argument{hint}")
        if given := [name for name in ("id", "dir", "resume") if name in arguments]:
            raise ValueError(f"{key}.{given[0]}: id, dir and resume follow from run_dir")
        if arguments.get("mode", "auto") == "auto" and (mode := mode_of_user()) not in MODES_OF_VARIABLE:
            raise ValueError(f"WANDB_MODE={mode}: must be one of {', '.join(MODES_OF_VARIABLE)}")
        project, id = os.environ.get("WANDB_PROJECT"), os.environ.get("WANDB_RUN_ID")
        for named, name, refused in (
            (f"{key}.project", arguments.get("project"), NOT_IN_PROJECTS),
            ("WANDB_PROJECT", project, NOT_IN_PROJECTS),
            ("WANDB_RUN_ID", id, NOT_IN_IDS),
        ):
            if wrong := sorted(set(name or "") & set(refused)):
                raise ValueError(f"{named}={name}: W&B takes no {' '.join(wrong)} in it")

    def begin(self, step: int) -> None:
        import wandb

        if DATA_DIR not in os.environ:
            # Tables are staged there; in a home that cannot be written to each would fail.
            os.environ[DATA_DIR] = SET_HERE[DATA_DIR] = str(self.run_dir.resolve() / "wandb")
        record = service_record(self.run_dir, "wandb")
        if (of_user := id_of_user(self.run_dir)) is not None and record["id"] != of_user:
            record = {"id": of_user, "step": 0}  # rows that the folder has logged elsewhere are logged there as well
            write_record(self.run_dir, record, "wandb")
        self.written_step = record["step"]
        given = {"project": None} if is_of_agent() else {"id": record["id"]}
        git = None if os.environ.get("WANDB_DISABLE_GIT") else git_state(Path.cwd())
        settings = {key: value for key, value in SETTINGS.items() if f"WANDB_{key.upper()}" not in os.environ}
        # W&B itself would send the remote with the name in it, which may be a token.
        settings |= (
            {"disable_git": True} if git is None else {"git_commit": git["commit"], "git_remote_url": git["remote"]}
        )
        options = self.options | given | {"dir": self.place, "settings": wandb.Settings(**settings)}
        if OPEN or wandb.run is not None:
            options |= {"reinit": "create_new"}  # another run of the process logs
        try:
            self.run = wandb.init(**options, mode=self.mode, resume="allow" if self.mode == "online" else None)
        except wandb.errors.CommError as error:
            reason = " ".join(str(error).split())
            logger.warning("wandb: no server (%s); logging offline to %s/wandb", reason, self.place)
            end_service()
            if OPEN:  # the service goes on, and holds the id that the server was asked for
                options |= {"id": f"{record['id']}-offline"}
            self.run = wandb.init(**options, mode="offline")
        if git is not None:
            self.run.config.update({"git": git}, allow_val_change=True)
        if self.mode != "disabled":
            self.begin_log()
        OPEN.add(self)
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP, step_sync=True)
        self.write_lost_rows(step)

    def begin_log(self) -> None:
        """Keep the run's log as its console, and the file that a sweep writes what a trial prints to.

        Both are uploaded as they grow. The console itself is not wrapped: `SETTINGS`.
        """
        self.log = RunLog(Path(self.run.dir) / CONSOLE)
        self.run.save(str(self.log.path), base_path=self.run.dir, policy="live")
        if (printed := self.run_dir / PRINTED).is_file():
            self.run.save(str(printed.resolve()), base_path=str(self.run_dir.resolve()), policy="live")

    def end_log(self) -> None:
        if self.log is not None:
            self.log.close()
            self.log = None

    def write_lost_rows(self, step: int) -> None:
        """Log what metrics.csv has up to `step` and W&B has not: its service was killed, or its disk full."""
        # A run that is resumed online knows what its server has.
        self.written_step = max(self.written_step, int(self.run.summary.get(STEP) or 0))
        _, rows = MetricsCSV(str(self.run_dir)).read()
        lost = [row for row in rows if row["step"].isdigit() and self.written_step < int(row["step"]) <= step]
        for row in lost:
            number = int(row.pop("step"))
            self.write_metrics({key: float(value) for key, value in row.items() if value}, number)
        if lost:
            logger.info("wandb: %d rows that an earlier start did not live to write are logged now", len(lost))

    def write_config(self, config: dict[str, Any]) -> None:
        self.run.config.update(config, allow_val_change=True)

    def write_metrics(self, metrics: dict[str, float], step: int) -> None:
        # A run that failed after its last checkpoint repeats steps; those that are written stay as they are.
        if step > self.written_step:
            self.run.log({**charts(metrics), STEP: step})
            self.note_written(step)

    def note_written(self, step: int) -> None:
        """Note what a start behind a killed one need not log again."""
        noted, logged = self.logged
        if time.monotonic() - noted >= FLUSH_SECONDS:
            write_record(self.run_dir, {"id": self.run.id, "step": max(logged, self.written_step)}, "wandb")
            self.logged = (time.monotonic(), step)

    def write_samples(self, columns: list[str], rows: list[list[Any]], step: int) -> None:
        import wandb

        if step > self.written_step:
            self.run.log({"samples": wandb.Table(columns=[*columns], data=rows), STEP: step})

    def write_alert(self, title: str, text: str) -> None:
        self.run.alert(title=f"{self.run.name}: {title}", text=f"{self.run_dir}: {text}")

    def end(self, status: str, adapter: Path) -> None:
        if self.run is None:
            return
        step = int(self.run.summary.get(STEP) or 0)
        if status == "finished" and (adapter / LINEAGE).exists():
            self.save_adapter(adapter, step)
        if status in ("preempted", "paused", "interrupted", "rolled back"):
            self.run.mark_preempting()
        self.summarize()
        if status == "diverged":
            self.run.alert(title=f"{self.run.name} diverged", text=f"{self.run_dir}: ended as diverged at step {step}")
        if status == "rolled back":
            text = f"{self.run_dir}: diverged after step {step}, and goes on from an earlier checkpoint"
            self.run.alert(title=f"{self.run.name} rolled back", text=text)
        self.end_log()
        # Until it finishes, up to 15 seconds of it are in the memory of another process.
        self.run.finish(exit_code=0 if status == "finished" else 1)
        self.forget()
        if not self.failed:
            write_record(self.run_dir, {"id": self.run.id, "step": max(step, self.written_step)}, "wandb")

    def summarize(self) -> None:
        """Put what `result.json` says beside the last values of the charts."""
        if summary := summary_of(self.run_dir):
            self.run.summary.update(summary)

    def forget(self) -> None:
        """Leave the process to its other runs; the folder for staged tables is that of the first until the last."""
        OPEN.discard(self)
        if not OPEN and SET_HERE.pop(DATA_DIR, None) is not None:
            os.environ.pop(DATA_DIR, None)

    def abandon(self) -> None:
        self.end_log()
        self.forget()
        if OPEN and self.run is not None:  # the next run of this process would be told to go on with this one
            self.run.finish(exit_code=1)
        # A service that is dead would be asked again by the next run of this process.
        end_service()

    def save_adapter(self, adapter: Path, step: int) -> None:
        """Save the adapter folder as an artifact whose metadata is its lineage; the files are not copied."""
        import wandb

        lineage = json.loads((adapter / LINEAGE).read_text(encoding="utf-8"))
        artifact = wandb.Artifact(f"adapter-{self.run.id}", type="adapter", metadata=lineage)
        artifact.add_dir(str(adapter), policy="immutable")
        self.run.log_artifact(artifact, aliases=["latest", f"step-{step}"])
