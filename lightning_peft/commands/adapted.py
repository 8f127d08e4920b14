"""What `evaluate`, `generate` and `merge` share: an adapter's own config, and its model on this machine."""

import logging

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lightning_peft.checkpoint.lineage import read_lineage
from lightning_peft.config import TrainConfig, train_config
from lightning_peft.data.config import DataConfig
from lightning_peft.data.layout import PromptLayout
from lightning_peft.inference.load import is_whole_model, load_adapted, tuned_folder
from lightning_peft.models.loading import load_model, load_tokenizer
from lightning_peft.models.source import ModelConfig
from lightning_peft.quantization.config import QuantizationConfig
from lightning_peft.training.precision import resolve_precision, weight_dtype

logger = logging.getLogger(__name__)


def saved_config(adapter_path: str | None) -> TrainConfig | None:
    """The config an adapter was trained with; None without an adapter, or for a folder of HF PEFT."""
    if adapter_path is None:
        return None
    lineage = read_lineage(tuned_folder(adapter_path))
    return train_config(lineage.config) if lineage is not None and lineage.config else None


def base_of(adapter_path: str | None, model: ModelConfig | None) -> tuple[ModelConfig, QuantizationConfig]:
    """Base model and quantisation: as given, else as trained."""
    saved = saved_config(adapter_path)
    if model is None and saved is None:
        raise ValueError(f"adapter_path={adapter_path}: the folder does not say its base in our terms; give model=")
    quantization = saved.quantization if saved is not None else QuantizationConfig()
    return model or saved.model, quantization  # type: ignore[union-attr]


def layout_of(adapter_path: str | None, tokenizer: PreTrainedTokenizerFast) -> PromptLayout:
    """How an adapter's prompts are written; the tokenizer's chat layout for a base, or a folder that does not say."""
    saved = None if adapter_path is None else PromptLayout.load(tuned_folder(adapter_path))
    if saved is not None:
        return saved
    trained = saved_config(adapter_path)
    return PromptLayout.of(trained.data if trained is not None else DataConfig(), None, tokenizer)


def inference_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_for_inference(
    adapter_path: str | None, model: ModelConfig | None, precision: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model, adapted where there is an adapter, and its tokenizer."""
    base, quantization = base_of(adapter_path, model)
    device = inference_device()
    dtype = weight_dtype(resolve_precision(precision, device.type, trains_all=False), trains_all=False)
    folder = None if adapter_path is None else tuned_folder(adapter_path)
    if folder is not None and is_whole_model(folder):
        base = ModelConfig(name="hf", path=str(folder))
    tokenizer = load_tokenizer(base)
    if folder is None or is_whole_model(folder):
        return load_model(base, dtype, quantization, device=device).eval(), tokenizer
    return load_adapted(folder, base, quantization, dtype, device), tokenizer
