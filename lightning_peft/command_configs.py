"""The root configs of the commands beside `train`."""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from lightning_peft.adapters.combine import DENSITY, Combine
from lightning_peft.checkpoint.merge_config import MergeConfig
from lightning_peft.config import TrainConfig, check_task
from lightning_peft.data.config import DataConfig
from lightning_peft.evaluation.own_pairs import Chosen
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.models.source import ModelConfig
from lightning_peft.serving.server_config import ServerConfig
from lightning_peft.sweeps.search import SweepConfig


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed that torch's generators do not take, or that a number added to it would make one."""
    if not 0 <= seed < 2**62:
        raise ValueError(f"seed={seed}: must be from 0 to 2^62 - 1")


def check_folder_of(key: str, file: str | None) -> None:
    """Raise ValueError for a file in a folder that is not there, before anything is computed for it."""
    if file is not None and not Path(file).absolute().parent.is_dir():
        raise ValueError(f"{key}={file}: there is no folder {Path(file).parent}; make it first")


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


class Scored(Enum):
    """The models that `evaluate` runs the rows through."""

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
    passes: int = 1
    """Draws of an adapter of method=balora whose probabilities for the rows' tokens are averaged, with how far they can
    be believed beside those of its mean; answers are the mean's. 1 draws none."""
    precision: str = "auto"
    """dtype of the computation, as trainer.precision."""
    imports: list[str] = field(default_factory=list)
    """Modules imported before options are read: the method or task of an adapter made with one's own."""
    output: str | None = None
    """JSON file of the scores; null writes evaluation.json beside the adapter."""
    gate: dict[str, float] = field(default_factory=dict)
    """Least improvement of the adapter over its base by metric, as {execution_accuracy:0.05,arc_easy/acc:-0.02}, shown
    by the lower end of its interval; exit status 4 where one is not. A number below 0 is what may be lost."""
    benchmark: str | None = None
    """lm_eval runs `tasks` of lm-evaluation-harness on base and adapter as well."""
    tasks: list[str] = field(default_factory=list)
    """Tasks of the harness."""
    tasks_path: str | None = None
    """Folder with task files of one's own for the harness."""
    benchmark_limit: int | None = None
    """Documents of each task; null takes all."""
    num_fewshot: int | None = None
    """Solved examples before each question of the harness; null takes that of the task."""

    def __post_init__(self) -> None:
        for key in ("max_rows", "batch_size", "passes"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: must be at least 1")
        if self.passes > 1 and (self.models is Scored.base or self.adapter_path is None):
            raise ValueError(f"passes={self.passes}: draws are of an adapter; give adapter_path and leave models=both")
        if self.benchmark not in (None, "lm_eval"):
            raise ValueError(f"benchmark={self.benchmark}: must be lm_eval, or null")
        if self.benchmark is None and (self.tasks or self.tasks_path):
            raise ValueError(f"tasks={self.tasks}: are those of benchmark=lm_eval, which is to be given too")
        if self.benchmark_limit is not None and self.benchmark_limit < 1:
            raise ValueError(f"benchmark_limit={self.benchmark_limit}: must be at least 1, or null")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"num_fewshot={self.num_fewshot}: must be 0 or more, or null")
        check_folder_of("output", self.output)
        if self.gate and (self.models is not Scored.both or self.adapter_path is None):
            raise ValueError("gate: compares an adapter with its base; give adapter_path and leave models=both")
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
    """Text file with one prompt a line, or .jsonl with `prompt` or `messages` in each row, and beside them what
    training reads: `system`, `tools`, and beside a prompt `input` and `history`. Answers go to `output` as JSONL, or to
    the terminal."""
    output: str | None = None
    """File for the answers of prompt_path."""
    system_prompt: str | None = None
    """System message; null takes the one the adapter was trained with."""
    imports: list[str] = field(default_factory=list)
    """Modules imported before options are read: the method or task of an adapter made with one's own."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    passes: int = 1
    """Draws of an adapter of method=balora whose probabilities are averaged for each token, with how unsure they are; 1
    draws none, and answers as a plain LoRA."""
    precision: str = "auto"
    """dtype of the computation, as trainer.precision."""

    def __post_init__(self) -> None:
        if self.passes < 1:
            raise ValueError(f"passes={self.passes}: must be at least 1")
        if self.passes > 1 and self.prompt is None and self.prompt_path is None:
            raise ValueError(f"passes={self.passes}: needs prompt= or prompt_path=; a chat takes no draws")
        if self.prompt is not None and self.prompt_path is not None:
            raise ValueError(f"prompt and prompt_path={self.prompt_path} are both given: use one")
        if self.adapter_path is None and self.model is None:
            raise ValueError("adapter_path=null: give a run or adapter folder, or model= for the base alone")
        check_folder_of("output", self.output)


@dataclass
class PairsConfig:
    """Writes pairs of answers for objective=dpo: a right one, and a wrong one of the adapter itself."""

    adapter_path: str = "???"
    """Run folder, adapter folder or sweep whose answers are drawn."""
    output: str = "???"
    """The .jsonl file of pairs; the counts go to the .json file of the same name."""
    samples: int = 4
    """Answers drawn to each prompt."""
    temperature: float = 1.0
    """Temperature of the drawing; 0 takes the most likely answer, of which there is one."""
    max_rows: int = 500
    """Training rows that are asked."""
    pairs_per_prompt: int = 1
    """Most pairs of one prompt: its worst answers, of equal ones those drawn most often."""
    chosen: Chosen = Chosen.row
    """The better answer: row for the row's own; best for the best that was drawn, the row's where none is as good; own
    for the best that was drawn alone, so that a prompt without one has no pair."""
    metric: str | None = None
    """Score of an answer, as an entry of validation.metrics: a metric of a task, or module:function, of which a large
    value is good; null takes that of data.task."""
    max_new_tokens: int | None = None
    """Longest answer in tokens; null takes that of the task."""
    batch_size: int = 64
    """Answers generated at once."""
    seed: int = 0
    """Seed of the drawing."""
    model: ModelConfig | None = None
    """Base model; null takes the one the adapter was trained on."""
    data: DataConfig | None = None
    """Rows to ask; null takes the training rows of the adapter."""
    precision: str = "auto"
    """dtype of the computation, as trainer.precision."""
    imports: list[str] = field(default_factory=list)
    """Modules imported before options are read: the method or task of an adapter made with one's own."""

    def __post_init__(self) -> None:
        for key in ("samples", "max_rows", "pairs_per_prompt", "batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: must be at least 1")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: must be at least 1, or null")
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature}: must be 0 (the most likely answer) or above")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(f"samples={self.samples} temperature=0: gives one answer so many times; use samples=1")
        check_seed(self.seed)
        if Path(self.output).suffix != ".jsonl" and self.output != "???":
            raise ValueError(f"output={self.output}: must end in .jsonl")
        if Path(self.output).is_dir():
            raise ValueError(f"output={self.output}: is a folder; name a file")
        check_folder_of("output", self.output)
        if self.data is not None:
            check_task(self.data)


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
    """The format that `export` writes."""

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
    svd_rank: int | None = None
    """plain, gguf_lora, ollama: cut the change of every layer to this rank by SVD, which also makes a pair of what is
    no low-rank sum (LR-LoRA, HiRA, DoRA, MiSS); what is lost is printed and written. null cuts nothing."""
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
        if self.svd_rank is not None and self.svd_rank < 1:
            raise ValueError(f"svd_rank={self.svd_rank}: must be at least 1, or null")
        if self.svd_rank is not None and self.format is ExportFormat.gguf:
            raise ValueError(f"svd_rank={self.svd_rank} format=gguf: a whole model has no rank; leave svd_rank out")
        if not self.max_kl > 0:
            raise ValueError(f"max_kl={self.max_kl}: must be above 0")


@dataclass
class PushConfig:
    """Uploads an adapter or a merged model to the hub, with its card."""

    adapter_path: str = "???"
    """Run folder, adapter folder, merged model, or a sweep, of which the best trial is taken."""
    repo: str = "???"
    """Name on the hub, as in me/my-adapter."""
    private: bool = False
    """Make a new repository private."""
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
    """Write each picture as a PNG beside the page, too."""


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
class CalibrateConfig:
    """Scores the calibration of an adapter's probabilities, on the rows it was validated on."""

    adapter_path: str = "???"
    """Run or adapter folder."""
    passes: int = 8
    """Draws that are averaged, of a BaLoRA adapter and with dropout."""
    dropout: float | None = None
    """Also score draws with this dropout in the adapters (MC dropout); null does not."""
    ensemble: list[str] = field(default_factory=list)
    """Other run folders of the same base, whose probabilities are averaged with the adapter's."""
    model: ModelConfig | None = None
    """Base model; null takes the one the adapter was trained on."""
    data: DataConfig | None = None
    """Rows to score on; null takes the data set the adapter was trained on."""
    max_rows: int = 200
    """Validation rows scored."""
    seed: int = 0
    """Seed of the draws."""
    precision: str = "auto"
    """dtype of the computation, as trainer.precision."""
    imports: list[str] = field(default_factory=list)
    """Modules imported before options are read: the method or task of an adapter made with one's own."""
    output: str | None = None
    """JSON file of the scores, the diagram beside it; null writes calibration.json beside the adapter."""

    def __post_init__(self) -> None:
        for key in ("passes", "max_rows"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: must be at least 1")
        if self.dropout is not None and not 0 < self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be above 0 and below 1, or null")
        check_seed(self.seed)
        check_folder_of("output", self.output)
        if self.data is not None:
            check_task(self.data)


class LowRankMethod(Enum):
    """The methods that `convert` writes."""

    lora = "lora"
    dora = "dora"


@dataclass
class ConvertConfig:
    """Cuts an adapter to a rank, makes several of one base one, or moves between LoRA and DoRA."""

    adapter_path: Any = "???"
    """Run or adapter folder, or a sweep for its best trial; or a list of them, as in [runs/a,runs/b]."""
    output: str = "???"
    """Folder to write; must not exist."""
    svd_rank: int | None = None
    """Typed rank=8 as well: cut the change of every layer to this rank by SVD; a layer of a smaller one keeps it. null
    cuts nothing but a change that is no low-rank sum, which is cut to the largest rank among its parts."""
    energy: float | None = None
    """Cut every layer to the smallest rank that keeps this share of its squared singular values, as in 0.99."""
    to: LowRankMethod | None = None
    """Typed method=dora as well: the method written, lora or dora; null keeps a LoRA a LoRA. A DoRA made of a LoRA
    gives the same outputs; a LoRA made of a DoRA is the nearest of its rank, the same where no magnitude has moved.
    """
    combine: Combine = Combine.linear
    """Combination of several adapters: linear, their exact sum; svd, the sum cut to the largest rank; ties; dare."""
    weights: list[float] = field(default_factory=list)
    """Factor of each adapter; empty takes equal parts that add up to one, and one for each with ties, which takes a
    mean itself."""
    density: float | None = None
    """Share of each change's numbers that ties and dare keep; null is 0.2 with ties, as in its paper, 0.5 with dare."""
    seed: int = 0
    """Seed of dare's drops."""
    max_kl: float | None = None
    """Largest mean KL(asked || written) accepted, nats per token; null is 0.01 where nothing is cut off, and none where
    something is."""
    model: ModelConfig | None = None
    """Base model; null takes the one the first adapter was trained on."""
    precision: str = "auto"
    """dtype in which asked and written are compared, as trainer.precision."""
    imports: list[str] = field(default_factory=list)
    """Modules imported before options are read: the method of an adapter made with one's own."""

    def __post_init__(self) -> None:
        paths = self.adapter_path
        if isinstance(paths, str) and paths.startswith("[") and paths.endswith("]"):
            # The command line takes the words of a path as they stand, those of a list too.
            paths = [path.strip(" '\"") for path in paths[1:-1].split(",") if path.strip()]
        self.paths: list[str] = [paths] if isinstance(paths, str) else paths
        if not isinstance(self.paths, list) or not self.paths or not all(isinstance(p, str) for p in self.paths):
            raise ValueError(f"adapter_path={self.adapter_path}: must be a folder, or a list of them")
        for key in ("svd_rank", "energy", "density", "max_kl"):
            if (value := getattr(self, key)) is not None and not value > 0:
                raise ValueError(f"{key}={value}: must be above 0, or null")
        for key in ("energy", "density"):
            if (value := getattr(self, key)) is not None and not value <= 1:
                raise ValueError(f"{key}={value}: is a share, above 0 and at most 1")
        if len(self.paths) == 1:
            if self.weights or self.combine is not Combine.linear or self.density is not None:
                raise ValueError(
                    f"adapter_path={self.paths[0]}: weights, combine and density are for several adapters, as in "
                    "adapter_path=[runs/a,runs/b]"
                )
        elif self.weights and len(self.weights) != len(self.paths):
            raise ValueError(
                f"weights={self.weights}: must be one for each of the {len(self.paths)} adapters, as in "
                f"[{','.join(['0.5'] * len(self.paths))}]"
            )
        check_seed(self.seed)
        if self.density is not None and self.combine not in DENSITY:
            raise ValueError(f"density={self.density}: only combine=ties and combine=dare leave numbers out")

    @property
    def shares(self) -> list[float]:
        """Return the factor of each adapter."""
        if self.weights:
            return self.weights
        takes_mean = self.combine is Combine.ties or len(self.paths) == 1
        return [1.0 if takes_mean else 1 / len(self.paths)] * len(self.paths)


@dataclass
class InspectConfig:
    """Measures what an adapter has learned: the size, the ranks and the directions of each layer's change."""

    adapter_path: str = "???"
    """Run or adapter folder, or a sweep for its best trial."""
    other_path: str | None = None
    """Another adapter of the same base, to see how many directions the two have in common."""
    intruders: int = 0
    """Largest directions of each tuned weight among which those are counted that are none of the base's; 0 counts none.
    The count takes two singular value decompositions of every weight."""
    directions: int = 0
    """Strongest directions that are read as keys and values, so many of the layers that write the residual stream and
    so many of the others: the tokens of the run's validation rows that each looks for, and of the former those that it
    promotes through the output head; 0 reads none."""
    smaller_ranks: bool = False
    """Score the adapter cut to half its rank, a quarter and so on, without training, on rows that the run was
    validated on."""
    max_rows: int = 200
    """Validation rows for smaller_ranks and directions."""
    model: ModelConfig | None = None
    """Base model; null takes the one the adapter was trained on."""
    precision: str = "auto"
    """dtype of the weights, as trainer.precision."""
    imports: list[str] = field(default_factory=list)
    """Modules imported before options are read: the method of an adapter made with one's own."""
    output: str | None = None
    """JSON file of every layer's figures, the picture beside it; null writes inspection.json beside the adapter."""

    def __post_init__(self) -> None:
        if self.intruders < 0:
            raise ValueError(f"intruders={self.intruders}: must be at least 0")
        if self.directions < 0:
            raise ValueError(f"directions={self.directions}: must be at least 0")
        check_folder_of("output", self.output)
        if self.max_rows < 1:
            raise ValueError(f"max_rows={self.max_rows}: must be at least 1")


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
