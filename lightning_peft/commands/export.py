"""`lightning-peft export`: a trained adapter as the files that other engines read, with a receipt."""

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from lightning_peft.adapters.inject import adapters, inject_adapters
from lightning_peft.adapters.merge import merge_adapters
from lightning_peft.adapters.registry import METHODS
from lightning_peft.checkpoint.atomic import atomic_folder
from lightning_peft.checkpoint.lineage import read_lineage
from lightning_peft.checkpoint.merged import Comparison, MergeError, Receipt, check_unused
from lightning_peft.checkpoint.peft_format import adapter_config_from_peft, load_adapter, tensors_beside
from lightning_peft.command_configs.of_adapters import ExportConfig, ExportFormat
from lightning_peft.commands.adapted import (
    base_of,
    best_of_sweep,
    check_has_room,
    features_of_folder,
    layout_of,
    load_base,
    load_for_inference,
    precision_of_change,
    saved_config,
)
from lightning_peft.commands.merge import logits_of_base, sample_ids
from lightning_peft.data.layout import PromptLayout
from lightning_peft.inference.load import is_whole_model, refuse_rewards, tuned_folder
from lightning_peft.models.gguf_metadata import check_written
from lightning_peft.models.loading import load_model, load_tokenizer, model_config, model_context
from lightning_peft.models.source import MODELS, ModelConfig, locate
from lightning_peft.quantization.weights import computing_dtype
from lightning_peft.runs.lock import only_maker
from lightning_peft.serving import gguf_lora, gguf_model, ollama
from lightning_peft.serving.engines import (
    NEVER_LOW_RANK,
    check_engines,
    features_of,
    largest_rank,
    not_low_rank,
    refuse_wrong_engines,
    spoken,
    table_of,
)
from lightning_peft.serving.plain import cut_pairs, inject_pairs, plain_pairs, write_plain
from lightning_peft.serving.prompt import TEMPLATE_NAME, template_as_trained
from lightning_peft.strict_json import json_text

logger = logging.getLogger(__name__)

RECEIPT_NAME = "export_receipt.json"
RESIDUAL_NAME = "svd_residual.json"
"""Layer -> share of its change's energy that svd_rank has cut off."""
LOW_RANK = (ExportFormat.plain, ExportFormat.gguf_lora)
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class ExportedRun:
    """A trained run, and how it is written."""

    folder: Path
    base: ModelConfig
    features: list[str]
    whole: bool
    """True where the run wrote a whole model (method=full)."""
    merged: bool
    """True where the export holds base and adapter in one."""
    base_name: str
    """The name by which other programs find the base; empty where the export holds the base."""


def export(config: ExportConfig) -> Receipt:
    """Write the adapter in a format of other engines, say what each does with it, and compare the file's logits.

    Raises ValueError, before a model is loaded, where the format cannot hold the adapter or an engine named would
    refuse it or compute it wrongly; MergeError, with nothing left at `output`, where the file is too far off.
    """
    with only_maker(Path(config.output)):
        return export_alone(config)


def export_alone(config: ExportConfig) -> Receipt:
    """Export into a folder that nobody else makes meanwhile."""
    config = replace(config, adapter_path=best_of_sweep(config.adapter_path))
    disable_progress_bar()  # ours stands in place of transformers' bar
    source = checked(config)
    if config.precision == "auto":
        config = replace(config, precision=precision_of_change(source.folder, source.base))
    model, tokenizer = load_for_inference(config.adapter_path, config.model, config.precision)
    layout = layout_of(config.adapter_path, tokenizer)
    if config.format is ExportFormat.ollama:
        ollama.modelfile("base", None if source.merged else "adapter", layout, tokenizer)  # errors before the work
    comparison = compared(config, source, model)
    output = Path(config.output)
    with atomic_folder(output) as partial:
        if source.merged:
            receipt = write_merged(config, source, model, tokenizer, layout, comparison, partial)
        else:
            receipt = write_pairs(config, source, model, tokenizer, layout, comparison, partial)
        (partial / RECEIPT_NAME).write_text(receipt.json_text())
        write_prompt(layout, tokenizer, partial)
        if not receipt.mean_kl <= config.max_kl:
            raise MergeError(
                f"output={output}: not written, KL {receipt.mean_kl:.3g} nats to the trained model is above "
                f"max_kl={config.max_kl}; {receipt.line('exported against trained')}"
            )
    print(f"{output}: {receipt.line('exported against trained')}")
    return receipt


def checked(config: ExportConfig) -> ExportedRun:
    """Look at the run and the format, without a model; print what each engine does with the result."""
    output, format = Path(config.output), config.format.value
    check_unused(output)
    if output.suffix == ".gguf":
        raise ValueError(f"output={output}: is made a folder, the file in it is model.gguf or adapter.gguf")
    check_engines("engine", config.engine)
    folder = tuned_folder(config.adapter_path)
    base, _ = base_of(config.adapter_path, config.model)
    whole = is_whole_model(folder)
    if not whole:
        refuse_rewards(folder)
        check_has_room(folder, base)
    if whole and config.format in LOW_RANK:
        raise ValueError(
            f"format={format}: {folder} holds a whole model, which is no adapter; other programs read it as it is"
        )
    adapter = METHODS["full"].config(method="full", rank=None) if whole else adapter_config_from_peft(folder)
    features = features_of(adapter) if whole else features_of_folder(folder)
    blocking = not_low_rank(features)
    if blocking in NEVER_LOW_RANK and config.svd_rank is not None:
        features = [feature for feature in features if feature != blocking] + ["lora"]
        blocking = not_low_rank(features)
    if blocking is not None and config.format in LOW_RANK:
        is_alone = not_low_rank(feature for feature in features if feature not in NEVER_LOW_RANK) is None
        nearest = "; svd_rank= makes the nearest one" if is_alone else ""
        raise ValueError(
            f"format={format}: {folder} has {spoken(blocking)}, which is no low-rank sum; "
            f"use {gguf_model.instead_of_pairs(model_config(base))}{nearest}"
        )
    merged = config.format is ExportFormat.gguf or (
        config.format is ExportFormat.ollama and (whole or blocking is not None or config.base_name is None)
    )
    if merged and config.svd_rank is not None:
        raise ValueError(
            f"svd_rank={config.svd_rank} format={format}: base and adapter are one file, which has no rank; leave it "
            "out, or name the base by base_name="
        )
    if not merged and config.dtype != "bf16":
        raise ValueError(
            f"dtype={config.dtype} base_name={config.base_name}: an adapter alone is fp32; leave dtype out"
        )
    if merged:
        text = model_config(base).get_text_config()
        check_written(text, text.tie_word_embeddings, gguf_model.keeps_positions(text, base_file(base)))
    rank = 0 if merged else config.svd_rank or largest_rank(adapter)
    refuse_wrong_engines(config.engine, features, rank, format)
    name = ""
    if config.format is ExportFormat.plain:
        name = resolving_name(config, base)
    elif config.format is ExportFormat.ollama and not merged:
        assert config.base_name is not None
        path = Path(config.base_name).expanduser()
        name = str(path.resolve()) if path.exists() else config.base_name
        logger.warning(
            "base_name=%s: Ollama from 0.34.1 on refuses a Modelfile with ADAPTER; without base_name base and adapter "
            "are one file, which all versions take", config.base_name,
        )  # fmt: skip
    elif config.base_name is not None and merged:
        raise ValueError(f"base_name={config.base_name}: this export holds the base itself; leave it out")
    for line in table_of(features, largest_rank(adapter), format, rank):
        print(line)
    return ExportedRun(folder, base, features, whole, merged, name)


def resolving_name(config: ExportConfig, base: ModelConfig) -> str:
    """Return the base's name for other programs: a hub id, or an absolute path. Raises ValueError for ours alone."""
    name = config.base_name or base.path
    if name is None or (config.base_name is None and name.endswith(".gguf")):
        raise ValueError(
            f"base_name=null: the adapter's base is {'model=' + base.name if name is None else name}, which only "
            "lightning-peft finds; give base_name=, a hub id or a folder of the same weights"
        )
    if config.base_name in MODELS:
        raise ValueError(f"base_name={config.base_name}: is our option's name, which other programs do not know")
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"base_name={name}: the folder has no config.json, so it holds no model")
        return str(path.resolve())
    if not HUB_ID.fullmatch(name):
        raise ValueError(f"base_name={name}: no such folder, and not a hub id such as org/name")
    return name


def base_file(base: ModelConfig) -> Path | None:
    """Return the GGUF file that a base is; None for a folder."""
    if base.is_tiny:
        return None
    location = locate(base)
    return location if location.suffix == ".gguf" else None


def compared(config: ExportConfig, source: ExportedRun, model: PreTrainedModel) -> Comparison:
    """Ask the trained model, which the written file is then compared with."""
    base_logits = None
    if not source.whole and (tensors_beside(source.folder) or any(layer.rewrote_base for _, layer in adapters(model))):
        base_logits = logits_of_base(config.adapter_path, config.model, config.precision)
    tokenizer = load_tokenizer(source.base)
    samples = sample_ids(saved_config(config.adapter_path), tokenizer, model_context(source.base))
    return Comparison(model, samples, base_logits, "export")


def write_pairs(
    config: ExportConfig,
    source: ExportedRun,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    layout: PromptLayout,
    comparison: Comparison,
    folder: Path,
) -> Receipt:
    """Write the adapter beside its base, and read it back into a fresh one."""
    if config.svd_rank is None:
        pairs = plain_pairs(model)
    else:
        pairs, lost = cut_pairs(model, config.svd_rank)
        worst = max(lost, key=lambda name: lost[name])
        print(
            f"svd_rank={config.svd_rank}: loses {sum(lost.values()) / len(lost):.2%} of a layer's change in the mean, "
            f"{lost[worst]:.2%} at {worst}"
        )
        (folder / RESIDUAL_NAME).write_text(json_text(lost))
    path = folder / gguf_lora.FILE_NAME
    if config.format is ExportFormat.plain:
        write_plain(pairs, model, folder, source.base_name, read_lineage(source.folder))
    else:
        gguf_lora.check_pairs(pairs, model, model_config(source.base).get_text_config().tie_word_embeddings)
        gguf_lora.write_gguf_lora(pairs, model, path, source.folder.parent.name)
    if config.format is ExportFormat.ollama:
        text = ollama.modelfile(source.base_name, f"./{path.name}", layout, tokenizer)
        (folder / ollama.FILE_NAME).write_text(text, encoding="utf-8")
    model.to_empty(device="meta")  # before the base is loaded again
    fresh = load_base(config.adapter_path, config.model, config.precision)
    if config.format is ExportFormat.plain:
        inject_adapters(fresh, adapter_config_from_peft(folder))
        load_adapter(fresh, folder)
    else:
        inject_pairs(fresh, gguf_lora.read_gguf_lora(path, fresh, list(pairs)))
    return comparison.receipt(fresh)


def write_merged(
    config: ExportConfig,
    source: ExportedRun,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    layout: PromptLayout,
    comparison: Comparison,
    folder: Path,
) -> Receipt:
    """Write base and adapter as one GGUF file, and read it back."""
    path, device, trained_in = folder / gguf_model.FILE_NAME, model.device, computing_dtype(model)
    merged = model if source.whole else merge_adapters(model, None if config.dtype == "bf16" else torch.float32)
    own_file = base_file(source.base)
    name = source.folder.parent.name
    gguf_model.write_gguf_model(merged, tokenizer, layout, path, config.dtype, own_file, name)
    if config.format is ExportFormat.ollama:
        text = ollama.modelfile(f"./{path.name}", None, layout, tokenizer)
        (folder / ollama.FILE_NAME).write_text(text, encoding="utf-8")
    merged.to_empty(device="meta")  # before the file is loaded
    dtype = torch.float32 if config.dtype == "fp32" else trained_in
    written = load_model(ModelConfig(name="hf", path=str(path)), dtype, device=device)
    return comparison.receipt(written)


def write_prompt(layout: PromptLayout, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the prompt beside the file: as we read it, and as a chat template that other engines take."""
    layout.save(folder)
    if (template := template_as_trained(layout, tokenizer)) is not None:
        (folder / TEMPLATE_NAME).write_text(template, encoding="utf-8")
