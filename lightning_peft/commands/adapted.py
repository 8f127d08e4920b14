"""An adapter's own config, and its model on this machine, for `evaluate`, `generate` and `merge`."""

import logging
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lightning_peft.adapters.new_biases import bias_options
from lightning_peft.checkpoint.lineage import read_lineage
from lightning_peft.checkpoint.peft_base import LORA_BIAS
from lightning_peft.checkpoint.peft_format import adapter_config_from_peft, tensors_beside
from lightning_peft.config import TrainConfig, train_config
from lightning_peft.data.config import DataConfig, Layout
from lightning_peft.data.layout import PromptLayout
from lightning_peft.data.mixture import shared_option
from lightning_peft.inference.load import base_named_by, is_whole_model, load_adapted, tuned_folder
from lightning_peft.inference.own_settings import settings_not_decoded
from lightning_peft.models.loading import empty_model, load_model, load_tokenizer
from lightning_peft.models.source import ModelConfig, locate
from lightning_peft.models.stored import stored_dtypes
from lightning_peft.quantization.config import QuantizationConfig
from lightning_peft.serving import adapter_checks
from lightning_peft.serving.engines import ENDS, features_of
from lightning_peft.sweeps.sweep import MANIFEST, read_sweep, refresh
from lightning_peft.sweeps.table import best_trial
from lightning_peft.training.precision import has_fast_bf16, resolve_precision, weight_dtype

logger = logging.getLogger(__name__)


def best_of_sweep(adapter_path: str) -> str:
    """Return the folder of a sweep's best trial, by the sweep's own metric; the path as it is where it is no sweep.

    Raises ValueError for a sweep none of whose trials has finished with a number.
    """
    folder = Path(adapter_path)
    if not (folder / MANIFEST).is_file():
        return adapter_path
    sweep = read_sweep(folder)
    refresh(sweep, folder, {})
    metric = sweep.metric.removeprefix("-")
    if (best := best_trial(sweep)) is None:
        raise ValueError(f"adapter_path={adapter_path}: a sweep, and no trial has finished with its metric, {metric}")
    logger.info("adapter_path=%s: the trial whose %s is best: %.6g", folder / best[0], metric, best[1])
    return str(folder / best[0])


def saved_config(adapter_path: str | None) -> TrainConfig | None:
    """Return the config an adapter was trained with; None without an adapter, or for a folder of HF PEFT."""
    if adapter_path is None:
        return None
    lineage = read_lineage(tuned_folder(adapter_path))
    return train_config(lineage.config) if lineage is not None and lineage.config else None


def base_of(adapter_path: str | None, model: ModelConfig | None) -> tuple[ModelConfig, QuantizationConfig]:
    """Return base model and quantisation: as given, else as trained."""
    saved = saved_config(adapter_path)
    if model is not None and saved is not None and saved.model.new_tokens and not model.new_tokens:
        logger.info("the adapter knows %d tokens more than its base: they are added", len(saved.model.new_tokens))
        model = replace(model, new_tokens=saved.model.new_tokens)
    if model is not None and saved is not None and saved.model.rope_scaling.is_on and not model.rope_scaling.is_on:
        logger.info("%s, as the adapter was trained", saved.model.rope_scaling)
        model = replace(model, rope_scaling=saved.model.rope_scaling)
    if saved is not None:
        return model or saved.model, saved.quantization
    if model is None and adapter_path is not None and (model := base_named_by(tuned_folder(adapter_path))) is not None:
        logger.info("model=%s, the base that %s names", model.path, adapter_path)
    if model is None:
        raise ValueError(f"adapter_path={adapter_path}: the folder does not name its base; give model=")
    return model, QuantizationConfig()


def saved_layout(adapter_path: str | None, model: ModelConfig | None) -> PromptLayout | None:
    """Return the layout of prompts that lies with an adapter; without one, that of a model that was merged or tuned."""
    if adapter_path is not None:
        return PromptLayout.load(tuned_folder(adapter_path))
    return None if model is None or model.is_tiny else PromptLayout.load(locate(model))


def continues_text(adapter_path: str | None, model: ModelConfig | None = None) -> bool:
    """Return whether an adapter, or a model, was trained on text without turns, as far as its folder says."""
    if (saved := saved_layout(adapter_path, model)) is not None:
        return saved.kind != "chat"
    trained = saved_config(adapter_path)
    return trained is not None and trained.data.layout is Layout.raw


def layout_of(
    adapter_path: str | None, tokenizer: PreTrainedTokenizerFast, model: ModelConfig | None = None
) -> PromptLayout:
    """Return the layout of prompts that lies with an adapter, or with a model; else the tokenizer's chat layout."""
    if (saved := saved_layout(adapter_path, model)) is not None:
        return saved
    trained = saved_config(adapter_path)
    data = trained.data if trained is not None else DataConfig()
    return PromptLayout.of(replace(data, system_prompt=shared_option(data, "system_prompt")), None, tokenizer)


def say_settings_not_followed(model: PreTrainedModel) -> None:
    """Log what the base's own generation config sets and no engine that serves it follows."""
    if ignored := settings_not_decoded(model):
        said = ", ".join(f"{key}={value}" for key, value in ignored.items())
        logger.warning(
            "generation_config.json of the base sets %s: answers here do not follow it, `generate` does", said
        )


def inference_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def inference_dtype(adapter_path: str | None, precision: str) -> torch.dtype:
    """Return the dtype of `precision`; `auto` is the one the adapter was trained in, else this machine's.

    In another dtype the weights would be rounded otherwise, and 4-bit codes be others.
    """
    device = inference_device().type
    here = resolve_precision(precision, device, has_fast_bf16(device), trains_all=False)
    lineage = None if adapter_path is None else read_lineage(tuned_folder(adapter_path))
    if lineage is None or lineage.precision is None:
        return weight_dtype(here, trains_all=False)
    trained = weight_dtype(lineage.precision, trains_all=False)
    if trained is not weight_dtype(here, trains_all=False):
        if precision == "auto":
            logger.info("precision=%s, as the adapter was trained", lineage.precision)
            return trained
        logger.warning("precision=%s: the adapter was trained in %s, outputs differ", precision, lineage.precision)
    return weight_dtype(here, trains_all=False)


def precision_of_change(folder: Path, base: ModelConfig) -> str:
    """Return the precision in which an adapter's change of its weights is taken, to be written: as trained, or `auto`.

    A folder of HF PEFT does not say what it was trained in: a change that depends on the base is taken in the dtype
    that most of the base is stored in, as a router's or a norm's fp32 is no reason to hold all weights in fp32.
    """
    if is_whole_model(folder) or read_lineage(folder) is not None:
        return "auto"
    stored = stored_dtypes(base)
    most = max(stored, key=lambda dtype: stored[dtype]) if stored else None
    return "32-true" if most in (torch.float32, torch.float64) else "auto"


def check_same_model(words: str, folder: Path, base: ModelConfig) -> None:
    """Raise ValueError for an adapter that was trained on other positions, or with other tokens, than a base has.

    `words` name the adapter as typed. The weights are the lineage's to compare.
    """
    lineage = read_lineage(folder)
    adapter_checks.check_same_model(
        words, lineage.config if lineage is not None else {}, asdict(base.rope_scaling), base.new_tokens
    )


def load_base(adapter_path: str, model: ModelConfig | None, precision: str) -> PreTrainedModel:
    """Return the model that an adapter was trained on, quantised as it was, without the adapter."""
    base, quantization = base_of(adapter_path, model)
    dtype = inference_dtype(adapter_path, precision)
    return load_model(base, dtype, quantization, device=inference_device()).eval()


def tokenizer_for_inference(adapter_path: str | None, model: ModelConfig | None) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a model, as `load_for_inference` loads it."""
    folder = None if adapter_path is None else tuned_folder(adapter_path)
    if folder is not None and is_whole_model(folder):
        return load_tokenizer(ModelConfig(name="hf", path=str(folder)))
    return load_tokenizer(base_of(adapter_path, model)[0])


def load_for_inference(
    adapter_path: str | None, model: ModelConfig | None, precision: str, takes_rewards: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return the model, with its adapter if it has one, and its tokenizer. ValueError for rewards unless taken."""
    base, quantization = base_of(adapter_path, model)
    device = inference_device()
    dtype = inference_dtype(adapter_path, precision)
    folder = None if adapter_path is None else tuned_folder(adapter_path)
    if folder is not None and is_whole_model(folder):
        base = ModelConfig(name="hf", path=str(folder))
    tokenizer = load_tokenizer(base)
    if folder is None or is_whole_model(folder):
        return load_model(base, dtype, quantization, device=device).eval(), tokenizer
    return load_adapted(folder, base, quantization, dtype, device, takes_rewards), tokenizer


def features_of_folder(folder: Path) -> list[str]:
    """Return the features of an adapter as it lies in a folder, the base's tensors in its file among them."""
    # A run of ours publishes such a start as a part of the change; HF PEFT repeats it on the base when it loads.
    unconverted = {"rewritten_base": "unconverted_start"}
    features = [unconverted.get(feature, feature) for feature in features_of(adapter_config_from_peft(folder))]
    for name in tensors_beside(folder):
        if name.endswith(LORA_BIAS):
            features.append("trained_biases")
        elif not name.endswith(".bias") or "trained_biases" not in features:
            features.append("trained_embeddings" if any(end in name for end in ENDS) else "trained_modules")
    return list(dict.fromkeys(features))


def check_has_room(folder: Path, base: ModelConfig) -> None:
    """Raise NotMergeableError for an adapter with biases that no model of the base's architecture has."""
    added = [name.removesuffix(LORA_BIAS) for name in tensors_beside(folder) if name.endswith(LORA_BIAS)]
    if added:
        model = empty_model(base)
        there = dict(model.named_parameters())
        bias_options(model, [f"{name}.bias" for name in added if f"{name}.bias" not in there])
