"""MLflow: one run for a run folder, over every start of it."""

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_peft.tracking.service_run import BAD_ENDS, PROJECT, MetricsRow, ServiceRun, flat

PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""Retries and seconds for a server that does not answer, where these variables are not set. MLflow's own seven tries of
two minutes would hold a training up for a quarter of an hour."""
MOST_PARAMETERS = 100
"""MLflow takes no more in a request."""
MOST_CHARACTERS = 500
"""Length of a parameter's value that every server takes."""
ENDS = {"finished": "FINISHED", "failed": "FAILED", "diverged": "FAILED"}
"""MLflow's words for how a run ended; all others are left to be gone on with."""


class MLflowRun(ServiceRun):
    """Logs to `tracking_uri`, else to what MLFLOW_TRACKING_URI says, else to where MLflow keeps runs by itself.

    `experiment` is MLFLOW_EXPERIMENT_NAME where it is null, else PROJECT. The sweep is the tag `group`.
    """

    needs = ("mlflow", "mlflow")

    def __init__(
        self,
        run_dir: str,
        tracking_uri: str | None = None,
        experiment: str | None = None,
        group: str | None = None,
        run_name: str | None = None,
        tags: dict[str, str] | None = None,
    ):
        super().__init__(run_dir, group, run_name)
        self.tracking_uri = tracking_uri
        self.experiment = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        self.tags = dict(tags or {})
        self.client: Any = None

    @property
    def name(self) -> str:
        return "mlflow"

    def open(self, id: str, is_new: bool) -> str:
        for variable, value in PATIENCE.items():
            os.environ.setdefault(variable, value)
        # The package is an optional extra, and takes seconds to import.
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # each try says a line; we say the last
        self.client = MlflowClient(self.tracking_uri)
        if not is_new:
            self.client.update_run(id, status="RUNNING")
            return id
        found = self.client.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                experiment_id = self.client.create_experiment(self.experiment)
            except MlflowException:  # another trial of the sweep was faster
                found = self.client.get_experiment_by_name(self.experiment)
                if found is None:
                    raise
        if found is not None:
            experiment_id = found.experiment_id
        tags = {"run_dir": str(self.run_dir.resolve())} | ({"group": self.group} if self.group else {}) | self.tags
        run = self.client.create_run(experiment_id, tags=tags, run_name=self.run_name)
        return str(run.info.run_id)

    def send(self, rows: list[MetricsRow]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(key, float(value), now, step) for step, values in rows for key, value in values.items()]
        for start in range(0, len(metrics), 1000):  # MLflow takes so many in a request
            self.client.log_batch(self.id, metrics=metrics[start : start + 1000])

    def send_config(self, config: dict[str, Any]) -> None:
        """Log the options as parameters; one of an earlier start keeps its first value, as MLflow wants."""
        from mlflow.entities import Param

        known = self.client.get_run(self.id).data.params
        params = [Param(key, str(value)[:MOST_CHARACTERS]) for key, value in flat(config).items() if key not in known]
        for start in range(0, len(params), MOST_PARAMETERS):
            self.client.log_batch(self.id, params=params[start : start + MOST_PARAMETERS])

    def write_samples(self, columns: list[str], rows: list[list[Any]], step: int) -> None:
        if step > self.known_step:
            table = [dict(zip(columns, row, strict=True)) for row in rows]
            self.client.log_text(self.id, json.dumps(table, indent=2, ensure_ascii=False), f"samples/step-{step}.json")

    def write_alert(self, title: str, text: str) -> None:
        self.client.set_tag(self.id, f"alert: {title}", text)

    def send_adapter(self, folder: Path, lineage: Mapping[str, Any], step: int) -> None:
        self.client.log_artifacts(self.id, str(folder), "adapter")

    def conclude(self, status: str, summary: Mapping[str, Any]) -> None:
        if status in BAD_ENDS:
            self.write_alert(status, f"{self.run_dir}: ended as {status} at step {self.sent_step}")
        for key, value in summary.items():
            self.client.set_tag(self.id, key, str(value))
        self.client.set_terminated(self.id, ENDS.get(status, "KILLED"))
