"""The root configs of the commands around `train`: estimate, data, report, d90, sweep, and the sweep part of submit."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from lightning_peft.command_configs.shared_checks import check_folder_of
from lightning_peft.config import TrainConfig
from lightning_peft.sweeps.search import SweepConfig


@dataclass
class EstimateConfig(TrainConfig):
    """The options of `estimate`: the need of `train` with the same overrides."""

    output: str | None = None
    """JSON file for the estimate; null prints it only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_folder_of("output", self.output)


@dataclass
class DataCommandConfig(TrainConfig):
    """Shows the rows that `train` would be given with the same words."""

    samples: int = 3
    """Samples shown."""
    histogram_path: str | None = None
    """PNG file for the histogram of their lengths."""
    strict: bool = False
    """Exit with status 2 where the audit warns of something."""

    def check_length(self) -> None:
        """Accept any length: no run follows, so none needs an end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 0:
            raise ValueError(f"samples={self.samples}: must be 0 or more")
        check_folder_of("histogram_path", self.histogram_path)


@dataclass
class ReportConfig:
    """Writes one HTML page of a run or sweep, which needs no network."""

    path: str = "???"
    """Folder of a run or of a sweep."""
    output: str | None = None
    """The .html file; null writes report.html into the folder."""
    png: bool = False
    """Write each picture as a PNG beside the page, too."""
    wandb: bool = False
    """Write the report of a sweep to W&B as well, on its server, where its trials were logged."""


@dataclass
class D90Config:
    """Reads the intrinsic dimension of a task off a sweep over `adapter.dimension`."""

    sweep_path: str = "???"
    """Folder of the sweep: one run folder a dimension."""
    reference_path: str = "???"
    """Run folder of full fine-tuning or LoRA on the same data, after `evaluate`."""
    metric: str = "loss"
    """loss: the distance of the validation loss below the base's; or a metric in every run's evaluation.json."""
    share: float = 0.9
    """Share of the reference's score to be reached; d90 takes 0.9."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}: must be above 0 and at most 1")


@dataclass
class PriceConfig:
    """The sources from which `estimate -m` and `submit -m dry_run=true` take the speed of a sweep's trials."""

    measured: list[str] = field(default_factory=lambda: ["runs", "sweeps"])
    """Folders below which finished runs of the same kind, on the same device, say how fast a trial is."""
    gpu: str | None = None
    """GPU that the trials will run on, as "H100" or "A100"; null takes this machine's."""
    utilization: float = 0.35
    """Share of a GPU's bf16 peak that is taken for reached where no run was measured. Ours."""
    output: str | None = None
    """JSON file for the prices; null prints them only."""

    def __post_init__(self) -> None:
        if not 0 < self.utilization <= 1:
            raise ValueError(f"price.utilization={self.utilization}: must be above 0 and at most 1")
        check_folder_of("price.output", self.output)


@dataclass
class SubmitSweepConfig:
    """The options of `submit -m` beside the words of a single run."""

    sweep_dir: str | None = None
    """Folder of the sweep; null takes sweeps/<time>."""
    dry_run: bool = False
    """Print what the sweep takes, by trial; write and submit nothing."""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    price: PriceConfig = field(default_factory=PriceConfig)


class SweepVerb(Enum):
    """The action on a sweep."""

    status = "status"
    retry = "retry"
    cancel = "cancel"
    table = "table"
    ask = "ask"


@dataclass
class SweepCommandConfig:
    """Looks at a sweep that `submit -m` started, or changes its course."""

    verb: SweepVerb = MISSING
    """status, retry, cancel, table; ask gives a worker or a task of a job array its next trial."""
    sweep_dir: str = MISSING
    """Folder of the sweep."""
    failed: bool = False
    """retry: every trial that failed, was lost, preempted or cancelled."""
    trials: list[str] = field(default_factory=list)
    """retry, cancel: these trials, by name; cancel without names takes all. ask: those that ended."""
    gone: str | None = None
    """A machine that is no more: the trials of a cluster=local sweep that run on it are taken for over."""
    ended: int | None = None
    """ask: the exit status of the trials that the task has run since its start; null at its start."""
    sort: str | None = None
    """table: column to sort by, -column for the largest first; null takes the sweep's metric."""
    output_path: str | None = None
    """table: also a .csv, .json, .html or .svg (the heat map) file."""

    def __post_init__(self) -> None:
        check_folder_of("output_path", self.output_path)
