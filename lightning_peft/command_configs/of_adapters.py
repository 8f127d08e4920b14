"""The root configs of the commands that read or rewrite adapters: merge, export, push, convert, inspect."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from lightning_peft.adapters.combine import DENSITY, Combine
from lightning_peft.checkpoint.merge_config import MergeConfig
from lightning_peft.command_configs.shared_checks import check_folder_of, check_seed
from lightning_peft.models.source import ModelConfig


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
    """A Modelfile with base and adapter in one file, or with the adapter beside the base that `base_name` names."""


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
    """plain: a hub id or folder by which others find the base; null takes model.path. ollama: the base's name there, or
    its GGUF file, beside which the adapter then lies as Ollama up to 0.34.0 takes it; null puts both in one file."""
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
