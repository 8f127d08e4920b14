"""The root config of `train`: every option, checked before anything expensive."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum
from typing import Any

from omegaconf import OmegaConf

from lightning_peft.adapters.base import AdapterConfig
from lightning_peft.adapters.initialization import Reads
from lightning_peft.adapters.registry import METHODS
from lightning_peft.cluster.job import ClusterConfig
from lightning_peft.data.config import DataConfig
from lightning_peft.data.mixture import sources_of, validation_losses
from lightning_peft.evaluation.scorers import check_direction, names_of_metrics
from lightning_peft.interpolation import escaped
from lightning_peft.models.source import ModelConfig
from lightning_peft.objectives.objective import ObjectiveConfig
from lightning_peft.objectives.reference import starts_as_base
from lightning_peft.objectives.registry import OBJECTIVES, validation_numbers
from lightning_peft.objectives.sft import SFTConfig
from lightning_peft.optim.optimizers import OPTIMIZERS, OptimizerConfig
from lightning_peft.optim.schedules import ScheduleConfig
from lightning_peft.quantization.config import QuantizationConfig
from lightning_peft.serving.engines import check_target_servers
from lightning_peft.tasks.registry import TASKS
from lightning_peft.training.config import (
    ActivationCheckpointing,
    CheckpointConfig,
    Compilation,
    EarlyStoppingConfig,
    GuardConfig,
    HealthConfig,
    StrategyConfig,
    StrategyKind,
    ValidationConfig,
    check_compilation,
)

logger = logging.getLogger(__name__)


MAY_BE_INFINITE = ("trainer", "callbacks", "logger", "claim", "gate", "max_kl")
"""Parts with arguments of other libraries, where inf may mean something, and limits that inf takes away."""


def check_finite(options: Any, key: str = "") -> None:
    """Raise ValueError for a nan or infinite number in the nested dictionaries of a config: no option means one.

    Comparisons with nan are false, so that it would pass most checks of a range.
    """
    if isinstance(options, dict):
        for name, value in options.items():
            check_finite(value, f"{key}.{name}" if key else str(name))
    elif isinstance(options, list):
        for value in options:
            check_finite(value, key)
    elif isinstance(options, float) and not math.isfinite(options):
        if math.isnan(options) or key.partition(".")[0] not in MAY_BE_INFINITE:
            raise ValueError(f"{key}={options}: must be a finite number")


def check_task(data: DataConfig) -> None:
    if data.task not in TASKS:
        raise ValueError(f"data.task={data.task}: must be one of {', '.join(TASKS)}")


def rows_of_objective(data: DataConfig, objective: ObjectiveConfig) -> DataConfig:
    """Return the data options with the rows that the objective takes. Raises ValueError for options of other rows."""
    if objective.name not in OBJECTIVES:
        raise ValueError(f"objective.name={objective.name}: must be one of {', '.join(OBJECTIVES)}")
    rows = OBJECTIVES[objective.name].rows
    if data.rows not in (None, rows):
        takers = [name for name, row in OBJECTIVES.items() if row.rows is data.rows]
        raise ValueError(
            f"data.rows={data.rows.name}: objective={objective.name} takes {rows.name}; leave it out, or use "
            f"objective={' or '.join(takers)}"
        )
    teachers = [name for name, row in OBJECTIVES.items() if row.reads_teacher_prompt]
    for source in sources_of(data):
        if source.config.teacher_prompt is not None and not OBJECTIVES[objective.name].reads_teacher_prompt:
            key = f"data.sources.{source.name}" if source.name else "data"
            raise ValueError(
                f"{key}.teacher_prompt: objective={objective.name} has no teacher that reads it; use "
                f"objective={' or '.join(teachers)}, or data.system_prompt for what the model itself reads"
            )
    if not OBJECTIVES[objective.name].gives_rewards:
        for source in sources_of(data):
            if (column := source.config.margin_column) is not None:
                key = f"data.sources.{source.name}" if source.name else "data"
                raise ValueError(
                    f"{key}.margin_column={column}: objective={objective.name} has no margins of rows; use "
                    f"objective={' or '.join(name for name, row in OBJECTIVES.items() if row.gives_rewards)}, "
                    "or leave it out"
                )
    return replace(data, rows=rows)


@dataclass
class TrainConfig:
    """Everything `train` does, resolved."""

    run_dir: str | None = None
    """Folder of the run; null takes runs/<time>-<method>-<model>."""
    method: str = "lora"
    """Name of the method in runs, jobs and W&B tags; set by the option file of `method=`."""
    imports: list[str] = field(default_factory=list)
    """Modules imported before options are read: methods, objectives, sources, tasks of one's own."""
    seed: int = 0
    """Seed of adapter init, data order and dropout."""
    resume: str = "never"
    """never: a used run_dir is an error; auto: continue from its latest checkpoint; or a checkpoint's path."""
    dry_run: bool = False
    """Show what would be trained, then stop."""
    pause_at: int | None = None
    """Optimiser step after which this start saves and pauses, with status 75; the schedule spans the whole run."""
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.elementwise
    """Activations that are recomputed in the backward pass instead of kept."""
    compile: Compilation = Compilation.auto
    """Part that torch.compile turns into kernels of its own: none, blocks, full; auto is blocks on a GPU."""
    device_memory_gib: float | None = None
    """Memory of the device a hardware profile is for; `estimate` compares with it, null takes this machine's."""
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    trainer: dict[str, Any] = field(default_factory=dict)
    """Arguments of lightning.pytorch.Trainer."""
    logger: dict[str, Any] = field(default_factory=dict)
    """Lightning loggers by name, each a `_target_` node."""
    callbacks: dict[str, Any] = field(default_factory=dict)
    """Further Lightning callbacks by name, each a `_target_` node."""
    cluster: ClusterConfig | None = None
    """Cluster on which `submit` runs the training; null under `train`, which runs it here."""
    target_server: list[str] = field(default_factory=list)
    """Engines that will serve the adapter: vllm, llama_cpp, sglang, lorax, tgi, ollama; checked before step 0."""
    claim: dict[str, Any] = field(default_factory=dict)
    """Scores that a recipe says it reaches; kept with the run, read by nobody else."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must be 0 or more")
        if self.seed >= 2**32:  # the generator of a step takes it beside the step's number
            raise ValueError(f"seed={self.seed}: must be below {2**32}")
        if self.pause_at is not None and self.pause_at < 1:
            raise ValueError(f"pause_at={self.pause_at}: must be at least 1, or null")
        if self.device_memory_gib is not None and not self.device_memory_gib > 0:
            raise ValueError(f"device_memory_gib={self.device_memory_gib}: must be above 0")
        check_compilation(self.compile, self.activation_checkpointing)
        check_task(self.data)
        self.check_metrics()
        self.data = rows_of_objective(self.data, self.objective)
        sources_of(self.data)
        for line in check_target_servers(self.target_server, self.adapter) if self.target_server else []:
            logger.info(line)
        self.check_length()
        if self.adapter.init_from is not None and not self.adapter.initialization.is_neutral:
            raise ValueError(
                f"adapter.init={self.adapter.init_name} adapter.init_from={self.adapter.init_from}: "
                "a warm start brings its own values; use adapter.init=kaiming"
            )
        method = self.adapter.method  # empty in a config that no option file has filled yet
        trains_all = method in METHODS and METHODS[method].trains_all
        if self.model.new_tokens and not self.adapter.trainable_modules and not trains_all:
            raise ValueError(
                f"model.new_tokens={self.model.new_tokens}: their embeddings would never be trained; "
                "add adapter.trainable_modules=[embed_tokens,lm_head]"
            )
        if self.adapter.initialization.reads is Reads.quantisation_error and not self.quantization.is_on:
            raise ValueError(
                f"adapter.init={self.adapter.init_name} makes up for what quantisation lost: "
                "use quantization=nf4 with it"
            )
        self.check_reference(trains_all)
        objective = OBJECTIVES[self.objective.name]
        if objective.check is not None and isinstance(self.objective, objective.config):
            objective.check(self, self.objective)  # not in a config that no option file has filled yet
        if trains_all and self.quantization.is_on:
            raise ValueError(
                f"method={method} quantization.kind={self.quantization.kind.name}: 4-bit weights cannot be trained; "
                "use quantization=none, or method=qlora"
            )

    def check_length(self) -> None:
        """Raise ValueError where nothing says when a run ends."""
        if self.data.streaming and self.trainer.get("max_steps", -1) in (None, -1):
            raise ValueError("data.streaming=true: how many rows there are is not known, so give trainer.max_steps")

    def check_metrics(self) -> None:
        """Raise ValueError for an unknown metric, and for one that is to choose something and is not computed."""
        computed = [
            *validation_losses(self.data),
            *validation_numbers(self.objective.name),
            *names_of_metrics(self.validation.metrics, self.data.task),
        ]
        for option, metric in self.choosing_metrics.items():
            if metric is None or (option == "checkpoint.best_by" and metric == "validation_loss"):
                continue
            if metric.removeprefix("-") not in computed:
                raise ValueError(
                    f"{option}={metric}: no validation computes it; choose one of {', '.join(computed)}, or add it to "
                    "validation.metrics"
                )
            if self.validation.every_n_steps is None:
                raise ValueError(
                    f"{option}={metric}: nothing is validated during training; give validation.every_n_steps"
                )

    @property
    def choosing_metrics(self) -> dict[str, str | None]:
        """Return the metrics that choose a checkpoint or an end, by option."""
        return {"checkpoint.best_by": self.checkpoint.best_by, "early_stopping.metric": self.early_stopping.metric}

    def check_directions(self) -> None:
        """Raise ValueError for a metric whose sign says the opposite of what is good; a run's folder may hold one."""
        for option, metric in self.choosing_metrics.items():
            if metric is not None:
                check_direction(option, metric)

    def check_reference(self, trains_all: bool) -> None:
        """Raise ValueError where the objective compares with a model that cannot be had beside the trained one."""
        if not OBJECTIVES[self.objective.name].uses_reference:
            return
        free = [name for name, row in OBJECTIVES.items() if row.rows is self.data.rows and not row.uses_reference]
        instead = f", or objective={' or '.join(free)}, which compares with none" if free else ""
        if trains_all:
            raise ValueError(
                f"objective={self.objective.name} method={self.adapter.method}: the reference is the model with "
                f"adapters off, and this method trains the model itself; use method=lora{instead}"
            )
        chooses = self.adapter.method in METHODS and METHODS[self.adapter.method].select is not None
        if self.strategy.kind is StrategyKind.fsdp and (chooses or not starts_as_base(self.adapter)):
            raise ValueError(
                f"objective={self.objective.name} strategy=fsdp: the reference is a copy of what trains where a run "
                "starts from adapter.init_from, rewrites the base, or trains modules or biases in full, and slices "
                f"keep no copy; use strategy=ddp{instead}"
            )


def train_config(saved: dict[str, Any]) -> TrainConfig:
    """Return the typed config from the plain dictionary that `config.yaml` and `lineage.json` hold.

    Raises ValueError for a method that is not known here; nothing that the dictionary names is imported.
    """
    check_finite(saved)
    method, modules = saved["adapter"]["method"], ",".join(saved.get("imports", []))
    if method not in METHODS:
        hint = f"it was made with imports=[{modules}]: give that too, if you trust it" if modules else "not one of ours"
        raise ValueError(f"method={method}: {hint}")
    objective = saved.get("objective", {}).get("name", SFTConfig.name)
    if objective not in OBJECTIVES:
        hint = f"it was made with imports=[{modules}]: give that too, if you trust it" if modules else "not one of ours"
        raise ValueError(f"objective={objective}: {hint}")
    schema = OmegaConf.structured(
        TrainConfig(
            adapter=METHODS[saved["adapter"]["method"]].config(),
            optimizer=OPTIMIZERS[saved["optimizer"]["name"]].config(),
            objective=OBJECTIVES[objective].config(),
        )
    )
    config = OmegaConf.to_object(OmegaConf.merge(schema, escaped(saved)))
    assert isinstance(config, TrainConfig)
    return config


def as_yaml(config: TrainConfig) -> str:
    """Return the text of a run's config.yaml, whose values mean themselves when it is read."""
    return OmegaConf.to_yaml(OmegaConf.create(escaped(plain(config))))


def plain(config: Any) -> dict[str, Any]:
    """Return a config dataclass as nested dictionaries of numbers and strings, fit for YAML and JSON."""
    return {entry.name: _plain_value(getattr(config, entry.name)) for entry in fields(config)}


def _plain_value(value: Any) -> Any:
    if is_dataclass(value):
        return plain(value)
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        return {str(key): _plain_value(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_value(part) for part in value]
    return value
