"""The root config of every command, and the table of schemas that its option files start from."""

import hashlib
import json
import logging
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from lightning_peft.adapters.base import AdapterConfig
from lightning_peft.adapters.init import Reads
from lightning_peft.adapters.registry import METHODS
from lightning_peft.checkpoint.merge_config import MergeConfig
from lightning_peft.cluster.slurm import ClusterConfig
from lightning_peft.data.config import DataConfig
from lightning_peft.evaluation.scorers import check_direction, names_of_metrics
from lightning_peft.evaluation.tasks import TASKS
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.models.source import ModelConfig
from lightning_peft.objectives.objective import ObjectiveConfig
from lightning_peft.objectives.reference import starts_as_base
from lightning_peft.objectives.registry import OBJECTIVES
from lightning_peft.objectives.sft import SFTConfig
from lightning_peft.optim.optimizers import OPTIMIZERS, OptimizerConfig
from lightning_peft.optim.schedules import ScheduleConfig
from lightning_peft.quantization.config import QuantizationConfig
from lightning_peft.serving.engines import check_target_servers
from lightning_peft.serving.server_config import ServerConfig
from lightning_peft.sweeps.search import SweepConfig
from lightning_peft.training.config import (
    ActivationCheckpointing,
    CheckpointConfig,
    Compilation,
    EarlyStoppingConfig,
    StrategyConfig,
    StrategyKind,
    ValidationConfig,
    check_compilation,
)
from lightning_peft.training.guard import GuardConfig

logger = logging.getLogger(__name__)

CONF_DIR = next(
    folder for parent in (Path(__file__).parent, Path(__file__).parent.parent) if (folder := parent / "conf").is_dir()
)
"""Inside the package in a wheel, beside it in a checkout."""


def check_task(data: DataConfig) -> None:
    if data.task not in TASKS:
        raise ValueError(f"data.task={data.task}: must be one of {', '.join(TASKS)}")


def rows_of_objective(data: DataConfig, objective: ObjectiveConfig) -> DataConfig:
    """Return the data options with the rows that the objective takes. Raises ValueError where others are asked for."""
    if objective.name not in OBJECTIVES:
        raise ValueError(f"objective.name={objective.name}: must be one of {', '.join(OBJECTIVES)}")
    rows = OBJECTIVES[objective.name].rows
    if data.rows not in (None, rows):
        takers = [name for name, row in OBJECTIVES.items() if row.rows is data.rows]
        raise ValueError(
            f"data.rows={data.rows.name}: objective={objective.name} takes {rows.name}; leave it out, or use "
            f"objective={' or '.join(takers)}"
        )
    return replace(data, rows=rows)


@dataclass
class TrainConfig:
    """Everything `train` does, resolved."""

    run_dir: str | None = None
    """Folder of the run; null takes runs/<time>-<method>-<model>."""
    method: str = "lora"
    """What runs, jobs and W&B tags call the method; set by the option file of `method=`."""
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
    """What is recomputed in the backward pass instead of kept."""
    compile: Compilation = Compilation.auto
    """What torch.compile turns into kernels of its own: none, blocks, full; auto is blocks on a GPU."""
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
    trainer: dict[str, Any] = field(default_factory=dict)
    """Arguments of lightning.pytorch.Trainer."""
    logger: dict[str, Any] = field(default_factory=dict)
    """Lightning loggers by name, each a `_target_` node."""
    callbacks: dict[str, Any] = field(default_factory=dict)
    """Further Lightning callbacks by name, each a `_target_` node."""
    cluster: ClusterConfig | None = None
    """Where `submit` runs it; null under `train`, which runs it here."""
    target_server: list[str] = field(default_factory=list)
    """Engines that will serve the adapter: vllm, llama_cpp, sglang, lorax, tgi, ollama; checked before step 0."""
    claim: dict[str, Any] = field(default_factory=dict)
    """What a recipe says it reaches; kept with the run, read by nobody else."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must be 0 or more")
        if self.pause_at is not None and self.pause_at < 1:
            raise ValueError(f"pause_at={self.pause_at}: must be at least 1, or null")
        if self.device_memory_gib is not None and self.device_memory_gib <= 0:
            raise ValueError(f"device_memory_gib={self.device_memory_gib}: must be above 0")
        check_compilation(self.compile, self.activation_checkpointing)
        check_task(self.data)
        self.check_metrics()
        self.data = rows_of_objective(self.data, self.objective)
        for line in check_target_servers(self.target_server, self.adapter) if self.target_server else []:
            logger.info(line)
        if self.data.streaming and self.trainer.get("max_steps", -1) in (None, -1):
            raise ValueError("data.streaming=true: how many rows there are is not known, so give trainer.max_steps")
        if self.adapter.init_from is not None and not self.adapter.initialization.is_neutral:
            raise ValueError(
                f"adapter.init={self.adapter.init_name} adapter.init_from={self.adapter.init_from}: "
                "a warm start brings its own values; use adapter.init=kaiming"
            )
        method = self.adapter.method  # empty in a config that no option file has filled yet
        trains_all = method in METHODS and not METHODS[method].layers
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
        if trains_all and self.quantization.is_on:
            raise ValueError(
                f"method={method} quantization.kind={self.quantization.kind.name}: 4-bit weights cannot be trained; "
                "use quantization=none, or method=qlora"
            )

    def check_metrics(self) -> None:
        """Raise ValueError for a metric that is not known, or that is to choose something and is not computed."""
        computed = ["validation_loss", *names_of_metrics(self.validation.metrics, self.data.task)]
        chosen_by = {"checkpoint.best_by": self.checkpoint.best_by, "early_stopping.metric": self.early_stopping.metric}
        for option, metric in chosen_by.items():
            if metric is None or (option == "checkpoint.best_by" and metric == "validation_loss"):
                continue
            if metric.removeprefix("-") not in computed:
                raise ValueError(
                    f"{option}={metric}: no validation computes it; choose one of {', '.join(computed)}, or add it to "
                    "validation.metrics"
                )
            check_direction(option, metric)
            if self.validation.every_n_steps is None:
                raise ValueError(
                    f"{option}={metric}: nothing is validated during training; give validation.every_n_steps"
                )

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
        if self.strategy.kind is StrategyKind.fsdp and not starts_as_base(self.adapter):
            raise ValueError(
                f"objective={self.objective.name} strategy=fsdp: the reference is a copy of what trains where a run "
                "starts from adapter.init_from, rewrites the base, or trains modules or biases in full, and slices "
                f"keep no copy; use strategy=ddp{instead}"
            )


@dataclass
class EstimateConfig(TrainConfig):
    """What `train` would need with the same overrides."""

    output: str | None = None
    """JSON file for the estimate; null prints it only."""


@dataclass
class DataCommandConfig(TrainConfig):
    """Shows the rows that `train` would be given with the same words."""

    samples: int = 3
    """Samples shown."""
    histogram_path: str | None = None
    """PNG file for the histogram of their lengths."""
    strict: bool = False
    """Exit with status 2 where the audit warns of something."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 0:
            raise ValueError(f"samples={self.samples}: must be 0 or more")


class Scored(Enum):
    """What `evaluate` runs the rows through."""

    both = "both"
    base = "base"
    adapter = "adapter"


@dataclass
class EvaluateConfig:
    """Scores a base model and its adapter on held-out rows."""

    adapter_path: str | None = None
    """Run folder, adapter folder, ours or HF PEFT's, or a sweep, of which the best trial is taken."""
    models: Scored = Scored.both
    """Score the base, the adapter, or both."""
    model: ModelConfig | None = None
    """Base model; null takes the one the adapter was trained on."""
    data: DataConfig | None = None
    """Rows to score on; null takes the data set the adapter was trained on."""
    max_rows: int = 200
    """Rows scored."""
    batch_size: int = 64
    """Prompts generated for at once."""
    samples: int = 4
    """Answers shown side by side."""
    precision: str = "auto"
    """dtype of the computation, as trainer.precision."""
    imports: list[str] = field(default_factory=list)
    """Modules imported before options are read: the method or task of an adapter made with one's own."""
    output: str | None = None
    """JSON file of the scores; null writes evaluation.json beside the adapter."""

    def __post_init__(self) -> None:
        for key in ("max_rows", "batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: must be at least 1")
        if self.data is not None:
            check_task(self.data)
        if self.adapter_path is None and (self.model is None or self.data is None):
            raise ValueError("adapter_path=null: give a run or adapter folder, or both model= and data=")


@dataclass
class GenerateConfig:
    """Answers one prompt, a file of prompts, or an interactive chat."""

    adapter_path: str | None = None
    """Run folder, adapter folder or sweep; null generates with the base model."""
    model: ModelConfig | None = None
    """Base model; null takes the one the adapter was trained on."""
    prompt: str | None = None
    """The user's message; null with no prompt_path starts a chat."""
    prompt_path: str | None = None
    """Text file with one prompt a line, or .jsonl with `prompt`, or `messages` and `tools`, in each row; answers go to
    `output` as JSONL, or to the terminal."""
    output: str | None = None
    """File for the answers of prompt_path."""
    system_prompt: str | None = None
    """System message; null takes the one the adapter was trained with."""
    imports: list[str] = field(default_factory=list)
    """Modules imported before options are read: the method or task of an adapter made with one's own."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    precision: str = "auto"
    """dtype of the computation, as trainer.precision."""

    def __post_init__(self) -> None:
        if self.prompt is not None and self.prompt_path is not None:
            raise ValueError(f"prompt and prompt_path={self.prompt_path} are both given: use one")
        if self.adapter_path is None and self.model is None:
            raise ValueError("adapter_path=null: give a run or adapter folder, or model= for the base alone")


@dataclass
class MergeCommandConfig:
    """Writes base and adapter as one plain model."""

    adapter_path: str = "???"
    """Run folder or adapter folder, or a sweep, of which the best trial is taken."""
    output: str = "???"
    """Folder to write; must not exist."""
    model: ModelConfig | None = None
    """Base model; null takes the one the adapter was trained on."""
    imports: list[str] = field(default_factory=list)
    """Modules imported before options are read: the method or task of an adapter made with one's own."""
    merge: MergeConfig = field(default_factory=MergeConfig)


class ExportFormat(Enum):
    """What `export` writes."""

    plain = "plain"
    """A LoRA folder with the scaling in B, for vLLM, SGLang, LoRAX and HF PEFT."""
    gguf_lora = "gguf_lora"
    """The adapter alone, for llama.cpp."""
    gguf = "gguf"
    """Base and adapter in one file, for llama.cpp."""
    ollama = "ollama"
    """A Modelfile with the adapter, or with base and adapter in one file."""


@dataclass
class ExportConfig:
    """Writes an adapter as another engine reads it."""

    adapter_path: str = "???"
    """Run folder or adapter folder."""
    output: str = "???"
    """Folder to write; must not exist."""
    format: ExportFormat = MISSING
    """plain, gguf_lora, gguf or ollama."""
    engine: list[str] = field(default_factory=list)
    """Engines that have to compute the export rightly: vllm, llama_cpp, sglang, lorax, tgi, ollama."""
    base_name: str | None = None
    """plain: a hub id or folder by which others find the base; ollama: the base's name there. null takes model.path."""
    dtype: str = "bf16"
    """gguf: fp32, bf16 or q8_0."""
    max_kl: float = 0.01
    """Largest mean KL(trained || exported) accepted, nats per token."""
    model: ModelConfig | None = None
    """Base model; null takes the one the adapter was trained on."""
    precision: str = "auto"
    """dtype in which trained and exported are compared, as trainer.precision."""
    imports: list[str] = field(default_factory=list)
    """Modules imported before options are read: the method or task of an adapter made with one's own."""

    def __post_init__(self) -> None:
        if self.dtype not in ("fp32", "bf16", "q8_0"):
            raise ValueError(f"dtype={self.dtype}: must be one of fp32, bf16, q8_0")
        if self.dtype != "bf16" and self.format not in (ExportFormat.gguf, ExportFormat.ollama):
            raise ValueError(f"dtype={self.dtype}: only format=gguf and ollama have one; an adapter alone is fp32")
        if self.base_name is not None and self.format not in (ExportFormat.plain, ExportFormat.ollama):
            raise ValueError(f"base_name={self.base_name}: only format=plain and ollama name their base")
        if self.max_kl <= 0:
            raise ValueError(f"max_kl={self.max_kl}: must be above 0")


@dataclass
class PushConfig:
    """Uploads an adapter or a merged model to the hub, with its card."""

    adapter_path: str = "???"
    """Run folder, adapter folder, merged model, or a sweep, of which the best trial is taken."""
    repo: str = "???"
    """Name on the hub, as in me/my-adapter."""
    private: bool = False
    """Whether a new repository is private."""
    message: str = "Upload with lightning-peft"
    """Message of the commit."""
    dry_run: bool = False
    """Write the card, list the files and the command that sends them, and send nothing."""


@dataclass
class ReportConfig:
    """Writes one HTML page of a run or sweep, which needs no network."""

    path: str = "???"
    """Folder of a run or of a sweep."""
    output: str | None = None
    """The .html file; null writes report.html into the folder."""
    png: bool = False
    """Whether each picture is written as a PNG beside the page, too."""


@dataclass
class ServeConfig:
    """Serves one base and its adapters behind OpenAI's endpoints."""

    adapters: list[str] = field(default_factory=list)
    """Adapters by the name clients give: [sql=runs/a,phones=runs/b]."""
    adapter_dir: str | None = None
    """Folder whose folders are adapters too, by their names; read when they are asked for."""
    model: ModelConfig | None = None
    """Base model; null takes the one the first adapter was trained on."""
    precision: str = "auto"
    """dtype of the computation, as trainer.precision."""
    imports: list[str] = field(default_factory=list)
    """Modules imported before options are read: the method or task of an adapter made with one's own."""
    serve: ServerConfig = field(default_factory=ServerConfig)

    def __post_init__(self) -> None:
        if not self.adapters and self.model is None:
            raise ValueError("adapters=[]: give adapters, as in adapters=[sql=runs/a], or model= for the base")
        if self.serve.allow_load and self.adapter_dir is None:
            raise ValueError("serve.allow_load=true: give adapter_dir=, the folder that adapters are loaded from")


@dataclass
class D90Config:
    """Reads the intrinsic dimension of a task off a sweep over `adapter.dimension`."""

    sweep_path: str = "???"
    """Folder of the sweep: one run folder a dimension."""
    reference_path: str = "???"
    """Run folder of full fine-tuning or LoRA on the same data, after `evaluate`."""
    metric: str = "loss"
    """loss: how far the validation loss falls below the base's; or a metric in every run's evaluation.json."""
    share: float = 0.9
    """Share of the reference's score to be reached; d90 takes 0.9."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}: must be above 0 and at most 1")


@dataclass
class SubmitSweepConfig:
    """What `submit -m` takes beside the words of a single run."""

    sweep_dir: str | None = None
    """Folder of the sweep; null takes sweeps/<time>."""
    sweep: SweepConfig = field(default_factory=SweepConfig)


class SweepVerb(Enum):
    """What to do with a sweep."""

    status = "status"
    retry = "retry"
    cancel = "cancel"
    table = "table"
    ask = "ask"


@dataclass
class SweepCommandConfig:
    """Looks at a sweep that `submit -m` started, or changes its course."""

    verb: SweepVerb = MISSING
    """status, retry, cancel, table; ask draws Optuna's next trial, for the workers."""
    sweep_dir: str = MISSING
    """Folder of the sweep."""
    failed: bool = False
    """retry: every trial that failed, was lost, preempted or cancelled."""
    trials: list[str] = field(default_factory=list)
    """retry, cancel: these trials, by name; cancel without names takes all."""
    gone: str | None = None
    """A machine that is no more: what a cluster=local sweep has running on it is taken for over."""
    sort: str | None = None
    """table: column to sort by, -column for the largest first; null takes the sweep's metric."""
    output_path: str | None = None
    """table: also a .csv, .json, .html or .svg (the heat map) file."""


ROOTS: dict[str, type] = {
    "train": TrainConfig,
    "data": DataCommandConfig,
    "estimate": EstimateConfig,
    "submit_sweep": SubmitSweepConfig,
    "sweep": SweepCommandConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "merge": MergeCommandConfig,
    "push": PushConfig,
    "report": ReportConfig,
    "export": ExportConfig,
    "serve": ServeConfig,
    "d90": D90Config,
}


def register_schemas() -> None:
    """Put every schema where the option files under `conf/` look for it; again where a module has added rows."""
    _register(tuple(METHODS), tuple(OPTIMIZERS), tuple(OBJECTIVES))


@cache
def _register(methods: tuple[str, ...], optimizers: tuple[str, ...], objectives: tuple[str, ...]) -> None:
    store = ConfigStore.instance()
    for command, root in ROOTS.items():
        store.store(name=f"{command}_schema", node=beyond_train(root) if issubclass(root, TrainConfig) else root)
    for name, method in METHODS.items():
        store.store(group="adapter", name=f"{name}_schema", node=with_open_dictionaries(method.config))
    for name, optimizer in OPTIMIZERS.items():
        store.store(group="optimizer", name=f"{name}_schema", node=optimizer.config)
    for name, objective in OBJECTIVES.items():
        store.store(group="objective", name=f"{name}_schema", node=with_open_dictionaries(objective.config))
    for name in methods:
        if (CONF_DIR / "adapter" / f"{name}.yaml").exists():
            continue
        # A method from outside the package needs no option files.
        overrides = {"adapter": name, "quantization": "none", "optimizer": "adamw"}
        defaults = [*({f"override /{group}": option} for group, option in overrides.items()), "_self_"]
        store.store(group="adapter", name=name, node={"defaults": [f"{name}_schema"]})
        store.store(group="method", name=name, package="_global_", node={"defaults": defaults, "method": name})
    for group, rows in {"optimizer": optimizers, "objective": objectives}.items():
        for name in rows:
            if not (CONF_DIR / group / f"{name}.yaml").exists():
                store.store(group=group, name=name, node={"defaults": [f"{name}_schema"]})
    singles = {
        "model": ModelConfig, "quantization": QuantizationConfig, "schedule": ScheduleConfig, "data": DataConfig,
        "strategy": StrategyConfig, "cluster": ClusterConfig,
    }  # fmt: skip
    for group, node in singles.items():
        store.store(group=group, name="schema", node=with_open_dictionaries(node))


def with_open_dictionaries(options: type) -> DictConfig:
    """Return the schema of a class of options whose dictionaries take keys that are not there yet."""
    schema = OmegaConf.structured(options)
    for field_ in fields(options):
        if isinstance(schema._get_node(field_.name), DictConfig):
            OmegaConf.set_struct(schema[field_.name], False)
    return schema


def beyond_train(root: type[TrainConfig]) -> DictConfig:
    """The schema of a command whose option file starts from train's: what the command has beyond it."""
    schema = OmegaConf.structured(root)
    if root is not TrainConfig:
        OmegaConf.set_struct(schema, False)
        for inherited in fields(TrainConfig):
            del schema[inherited.name]
        OmegaConf.set_struct(schema, None)
    return schema


NAME_LENGTH = 120
"""Longest folder name of a trial; file systems take 255 bytes."""


def trial_name(overrides: str) -> str:
    """Folder of a sweep's trial: "adapter.rank=4,adapter.alpha=16" -> "rank4_alpha16"; no = and no , in it.

    Other overrides have another name: where one is cut, or a character replaced, a digest of the whole follows.
    """
    words = [override.lstrip("+").partition("=") for override in overrides.split(",") if override]
    name = "_".join(key.rpartition(".")[2] + value for key, _, value in words) or "trial"
    folder = "".join(c if c.isalnum() or c in "._+-" else "-" for c in name)[:NAME_LENGTH]
    keys = {key.rpartition(".")[2] for key, _, _ in words}
    may_read_otherwise = len(words) > 1 and any(f"_{key}" in value for key in keys for _, _, value in words)
    if folder == name and not may_read_otherwise:
        return folder
    return f"{folder}-{hashlib.sha256(overrides.encode()).hexdigest()[:4]}"


def model_label(*, _root_: DictConfig) -> str:
    """The model's name for people: llama_3_1_8b, or the last part of `model.path`."""
    model = _root_.model
    if model.label or model.name != "hf" or not model.path:
        return str(model.label or model.name)
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in Path(model.path).name.removesuffix(".gguf"))


def run_label(*, _root_: DictConfig) -> str:
    """Method and model of a run, as in qlora-llama_3_1_8b."""
    return f"{_root_.method}-{model_label(_root_=_root_)}"


def config_digest(*, _root_: DictConfig) -> str:
    """Eight letters that tell configs apart; where a run stands, logs, and on which cluster it runs does not count.

    Only what differs from the defaults does, so that a version with one more option finds the runs of this one.
    """
    uncounted = ("run_dir", "cluster", "resume", "dry_run", "logger")
    counted = {key: value for key, value in set_options(_root_).items() if key.partition(".")[0] not in uncounted}
    counted |= {"adapter": _root_.adapter.method, "optimizer": _root_.optimizer.name}  # a default of their own classes
    if _root_.objective.name != SFTConfig.name:  # which runs of before there was another had
        counted["objective"] = _root_.objective.name
    return hashlib.sha256(json.dumps(counted, sort_keys=True, default=str).encode()).hexdigest()[:8]


def set_options(config: DictConfig, prefix: str = "") -> dict[str, Any]:
    """Every option, by its whole key, that is not what its dataclass, or for the Trainer train.yaml, gives it."""
    kind = OmegaConf.get_type(config)
    defaults = OmegaConf.structured(kind) if is_dataclass(kind) else OmegaConf.create(trainer_defaults(prefix))
    given = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    default = OmegaConf.to_container(defaults, resolve=False, enum_to_str=True)
    assert isinstance(given, dict) and isinstance(default, dict)
    differing: dict[str, Any] = {}
    for key, value in ((str(key), value) for key, value in given.items()):
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            differing |= set_options(node, f"{prefix}{key}.")
        elif key not in default or default[key] != value:
            differing[f"{prefix}{key}"] = value
    return differing


@cache
def trainer_defaults(prefix: str) -> dict[Any, Any]:
    """What train.yaml gives the keys below `trainer.`; nothing for other prefixes."""
    if prefix != "trainer.":
        return {}
    defaults = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "train.yaml").trainer, resolve=False)
    assert isinstance(defaults, dict)
    return defaults


# At the import: processes that a Hydra launcher starts get the schemas from it, but no resolvers.
OmegaConf.register_new_resolver("trial_name", trial_name, replace=True)
OmegaConf.register_new_resolver("model_label", model_label, replace=True)
OmegaConf.register_new_resolver("run_label", run_label, replace=True)
OmegaConf.register_new_resolver("config_digest", config_digest, replace=True)


def train_config(saved: dict[str, Any]) -> TrainConfig:
    """The typed config from the plain dictionary that `config.yaml` and `lineage.json` hold.

    Raises ValueError for a method that is not known here; nothing that the dictionary names is imported.
    """
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
    config = OmegaConf.to_object(OmegaConf.merge(schema, saved))
    assert isinstance(config, TrainConfig)
    return config


def plain(config: Any) -> dict[str, Any]:
    """A config dataclass as nested dictionaries of numbers and strings, fit for YAML and JSON."""
    node = OmegaConf.structured(config) if not isinstance(config, DictConfig) else config
    container = OmegaConf.to_container(node, resolve=True, enum_to_str=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}
