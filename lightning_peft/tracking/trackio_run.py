"""Trackio: one run for a run folder, over every start of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_peft.tracking.service_run import BAD_ENDS, PROJECT, MetricsRow, ServiceRun, flat


class TrackioRun(ServiceRun):
    """Logs to Trackio's folder on this machine, or to a Space or server where `options` for `trackio.init` name one.

    Trackio knows a run by its name alone, so the name ends in the folder's own id.
    """

    needs = ("trackio", "trackio")

    def __init__(
        self,
        run_dir: str,
        project: str | None = None,
        group: str | None = None,
        run_name: str | None = None,
        **options: Any,
    ):
        super().__init__(run_dir, group, run_name)
        if taken := sorted({"name", "resume", "config"} & options.keys()):
            raise ValueError(f"logger.trackio.{taken[0]}: follows from run_dir")
        self.project = project or PROJECT
        self.options = options
        self.run: Any = None

    @property
    def name(self) -> str:
        return "trackio"

    def open(self, id: str, is_new: bool) -> str:
        # The package is an optional extra.
        import trackio

        own = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        self.run = trackio.init(
            project=self.project,
            name=f"{self.run_name}-{id[:6]}",
            group=self.group,
            resume="allow",
            **(own | self.options),
        )
        return id

    def send(self, rows: list[MetricsRow]) -> None:
        for step, values in rows:
            self.run.log(values, step=step)

    def send_config(self, config: dict[str, Any]) -> None:
        for key, value in flat(config).items():
            self.run.config[key] = value

    def write_samples(self, columns: list[str], rows: list[list[Any]], step: int) -> None:
        import trackio

        if step > self.known_step:
            self.run.log({"samples": trackio.Table(columns=columns, data=rows)}, step=step)

    def write_alert(self, title: str, text: str) -> None:
        self.run.alert(f"{self.run.name}: {title}", text)

    def send_adapter(self, folder: Path, lineage: Mapping[str, Any], step: int) -> None:
        import trackio

        artifact = trackio.Artifact(f"adapter-{self.id}", type="model", metadata=dict(lineage))
        artifact.add_dir(folder)
        self.run.log_artifact(artifact, aliases=["latest", f"step-{step}"])

    def conclude(self, status: str, summary: Mapping[str, Any]) -> None:
        import trackio

        numbers = {f"result/{key}": value for key, value in summary.items() if type(value) in (int, float)}
        if numbers:
            self.run.log(numbers, step=self.sent_step)
        if status in BAD_ENDS:
            self.run.alert(f"{self.run.name}: {status}", level=trackio.AlertLevel.ERROR)
        self.run.finish()
