"""A base model with a trained adapter in it, from the adapter's folder."""

import logging
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.checkpoint.lineage import check_lineage
from lightning_peft.checkpoint.peft_format import CONFIG_NAME, adapter_config_from_peft, load_adapter
from lightning_peft.checkpoint.peft_words import gives_rewards, read_words
from lightning_peft.models.loading import load_model, model_name
from lightning_peft.models.reward_head import add_reward_head
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.stored import source_fingerprint
from lightning_peft.quantization.config import QuantizationConfig
from lightning_peft.quantization.quantize import dequantize_modules
from lightning_peft.strict_json import read_object

MODEL_FOLDER = "model"
"""Folder that a run of full fine-tuning writes its model to; other runs write `adapter/`."""

logger = logging.getLogger(__name__)


def tuned_folder(path: str) -> Path:
    """Return the folder with the result of a run: an adapter folder, or `adapter/`, or `model/` of full fine-tuning."""
    if (Path(path) / MODEL_FOLDER / "config.json").is_file():
        return Path(path) / MODEL_FOLDER
    return adapter_folder(path)


def adapter_folder(path: str, option: str = "adapter_path") -> Path:
    """Return the adapter folder of a path: the folder itself, or `adapter/` of a run. Raises ValueError without one."""
    for folder in (Path(path), Path(path) / "adapter"):
        if (folder / CONFIG_NAME).is_file():
            return folder
    if not Path(path).exists():
        raise ValueError(f"{option}={path}: no such folder")
    for folder in (Path(path), Path(path) / MODEL_FOLDER):
        if (folder / "config.json").is_file():
            raise ValueError(
                f"{option}={path}: holds a whole model, which is no adapter; commands with model= take it as model=hf "
                f"model.path={folder}"
            )
    if (Path(path) / "result.json").is_file() or (Path(path) / "config.yaml").is_file():
        raise ValueError(f"{option}={path}: {_why_without_adapter(Path(path))}")
    raise ValueError(f"{option}={path}: neither a run nor an adapter folder, {CONFIG_NAME} is missing")


def _why_without_adapter(run: Path) -> str:
    """Say why a run has no adapter, and what to do."""
    path = run / "result.json"
    status = read_object(path, "the run did not live to write it").get("status") if path.is_file() else None
    said = "this run has not ended" if status is None else f"this run is {status}"
    said += f", and no adapter is saved yet; the command of train with run_dir={run} resume=auto goes on with it"
    if (run / "adapter_best" / CONFIG_NAME).is_file():
        said += f", and {run / 'adapter_best'} is the best it had"
    return said


def base_named_by(folder: Path) -> ModelConfig | None:
    """Return the base that the `adapter_config.json` of HF PEFT names, None where it names none."""
    words = read_words(folder)
    name = words.get("base_model_name_or_path")
    return ModelConfig(name="hf", path=name, revision=words.get("revision")) if name else None


def is_whole_model(folder: Path) -> bool:
    """Return whether a tuned folder holds all weights, and no adapter."""
    return not (folder / CONFIG_NAME).is_file()


def refuse_rewards(folder: Path) -> None:
    """Raise ValueError for the adapter of a reward model, where answers are to be written."""
    if gives_rewards(folder):
        raise ValueError(
            f"{folder}: the adapter of a reward model, which scores answers and writes none; `lightning-peft evaluate` "
            "scores with it, and transformers' AutoModelForSequenceClassification with HF PEFT loads it"
        )


def load_adapted(
    folder: Path,
    model: ModelConfig,
    quantization: QuantizationConfig,
    dtype: torch.dtype,
    device: torch.device,
    takes_rewards: bool = False,
) -> PreTrainedModel:
    """Return the model of `model` with the adapter of `folder`, in eval mode.

    Raises ValueError for a reward model unless `takes_rewards`, LineageError when the adapter was trained on another
    base, AdapterFileError when its file does not fit.
    """
    if not takes_rewards:
        refuse_rewards(folder)
    check_lineage(folder, source_fingerprint(model), quantization.kind.name, model_name(model))
    adapter = adapter_config_from_peft(folder)
    loaded = load_model(model, dtype, quantization, device=device)
    if gives_rewards(folder):
        add_reward_head(loaded)
    dequantize_modules(loaded, adapter.trainable_modules)
    inject_adapters(loaded, adapter)
    load_adapter(loaded, folder)
    return loaded.eval()
