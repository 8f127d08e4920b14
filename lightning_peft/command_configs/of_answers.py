"""The root configs of the commands that run a trained model: evaluate, generate, pairs, calibrate, serve."""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from lightning_peft.command_configs.shared_checks import check_folder_of, check_seed
from lightning_peft.config import check_task
from lightning_peft.data.config import DataConfig
from lightning_peft.evaluation.own_pairs import Chosen
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.models.source import ModelConfig
from lightning_peft.serving.server_config import ServerConfig


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
        of_benchmark = ("tasks", "tasks_path", "benchmark_limit", "num_fewshot")
        given = [key for key in of_benchmark if getattr(self, key) not in (None, [])]
        if self.benchmark is None and given:
            raise ValueError(f"{given[0]}={getattr(self, given[0])}: is of benchmark=lm_eval, which is to be given too")
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
class ServeConfig:
    """Serves one base and its adapters behind OpenAI's endpoints."""

    adapters: list[str] = field(default_factory=list)
    """Adapters by the name clients give: [sql=runs/a,phones=runs/b]."""
    adapter_dir: str | None = None
    """Folder whose folders are adapters too, by their names, as a sweep's trials; read when they are asked for, and
    again when their files have changed."""
    model: ModelConfig | None = None
    """Base model; null takes the one the first adapter was trained on."""
    precision: str = "auto"
    """dtype of the computation, as trainer.precision."""
    imports: list[str] = field(default_factory=list)
    """Modules imported before options are read: the method or task of an adapter made with one's own."""
    serve: ServerConfig = field(default_factory=ServerConfig)

    def __post_init__(self) -> None:
        if not self.adapters and self.adapter_dir is None and self.model is None:
            raise ValueError(
                "adapters=[]: give adapters, as in adapters=[sql=runs/a], a folder of them as adapter_dir=, or model= "
                "for the base"
            )
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
