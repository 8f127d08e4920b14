"""Comet: one experiment for a run folder, over every start of it."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_peft.tracking.service_run import BAD_ENDS, PROJECT, MetricsRow, ServiceRun, flat

logger = logging.getLogger(__name__)

QUIET: dict[str, Any] = {
    "log_code": False,
    "log_graph": False,
    "parse_args": False,
    "display_summary_level": 0,
    "auto_output_logging": False,
    "auto_param_logging": False,
    "auto_metric_logging": False,
    "auto_log_co2": False,
}
"""Options for what Comet would find out by itself beside what the run logs."""


REPORTS_OF_ITSELF = "COMET_INTERNAL_SENTRY_DSN"
"""Environment variable with the address to which Comet reports errors of its own; a machine without a network would
wait for it at its end."""


class CometRun(ServiceRun):
    """A run logged online where there is a key, else into `<run_dir>/comet`, for `comet upload` later.

    Every start of a folder goes on in one experiment; of an offline one each start leaves an archive, to be uploaded in
    their order.
    """

    needs = ("comet", "comet_ml")

    def __init__(
        self,
        run_dir: str,
        project: str | None = None,
        workspace: str | None = None,
        group: str | None = None,
        run_name: str | None = None,
        tags: list[str] | None = None,
    ):
        super().__init__(run_dir, group, run_name)
        self.project, self.workspace, self.tags = project or PROJECT, workspace, list(tags or [])
        self.experiment: Any = None

    @property
    def name(self) -> str:
        return "comet"

    def open(self, id: str, is_new: bool) -> str:
        os.environ.setdefault(REPORTS_OF_ITSELF, "")
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # each try says a line; we say the last
        # The package is an optional extra, and takes seconds to import.
        import comet_ml

        is_online = bool(comet_ml.config.get_config("comet.api_key"))
        folder = self.run_dir / "comet"
        if not is_online:
            folder.mkdir(parents=True, exist_ok=True)
            logger.info("comet: no key, logging offline to %s (comet upload sends it)", folder)
        tags = [*self.tags, *([self.group] if self.group else [])]
        options = comet_ml.ExperimentConfig(**QUIET, name=self.run_name, tags=tags, offline_directory=str(folder))
        self.experiment = comet_ml.start(
            workspace=self.workspace,
            project_name=self.project,
            experiment_key=id * 3,  # Comet wants at least 32 characters
            mode="create" if is_new else "get",
            online=is_online,
            experiment_config=options,
        )
        return id

    def send(self, rows: list[MetricsRow]) -> None:
        for step, values in rows:
            self.experiment.log_metrics(values, step=step)

    def send_config(self, config: dict[str, Any]) -> None:
        self.experiment.log_parameters(flat(config))

    def write_samples(self, columns: list[str], rows: list[list[Any]], step: int) -> None:
        if step > self.known_step:
            self.experiment.log_table(f"samples-{step}.csv", tabular_data=rows, headers=columns)

    def write_alert(self, title: str, text: str) -> None:
        self.experiment.log_other(f"alert: {title}", text)

    def send_adapter(self, folder: Path, lineage: Mapping[str, Any], step: int) -> None:
        # Comet's artifacts need a server; its models do not.
        self.experiment.log_model(f"adapter-{self.id}", str(folder), metadata=flat(lineage) | {"step": step})

    def conclude(self, status: str, summary: Mapping[str, Any]) -> None:
        if status in BAD_ENDS:
            self.write_alert(status, f"{self.run_dir}: ended as {status} at step {self.sent_step}")
        self.experiment.log_others(dict(summary) | ({"group": self.group} if self.group else {}))
        self.experiment.end()

    def abandon(self) -> None:
        if self.experiment is not None:
            self.experiment.end()
