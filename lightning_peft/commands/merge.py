"""`lightning-peft merge`: base and adapter as one plain model folder, with a receipt of the difference."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from lightning_peft.checkpoint.lineage import Lineage, read_lineage
from lightning_peft.checkpoint.merge_config import MergeBase
from lightning_peft.checkpoint.merged import Receipt, check_unused, logits_of
from lightning_peft.checkpoint.merged import merge as write_merged
from lightning_peft.checkpoint.model_card import write_card
from lightning_peft.checkpoint.peft_format import adapter_config_from_peft, changes_base
from lightning_peft.command_configs.of_adapters import MergeCommandConfig
from lightning_peft.commands.adapted import (
    base_of,
    best_of_sweep,
    check_has_room,
    inference_device,
    layout_of,
    load_base,
    load_for_inference,
    precision_of_change,
    saved_config,
)
from lightning_peft.config import TrainConfig
from lightning_peft.data.chat import encode
from lightning_peft.data.conversation import Message
from lightning_peft.data.samples import first_samples
from lightning_peft.inference.load import is_whole_model, tuned_folder
from lightning_peft.models.loading import load_model, load_tokenizer, model_context, model_name
from lightning_peft.models.source import ModelConfig, copy_companions
from lightning_peft.models.stored import source_fingerprint, stored_dtypes
from lightning_peft.quantization.weights import computing_dtype
from lightning_peft.runs.lock import only_maker

SAMPLES = 16
"""Conversations the merged model is compared on."""
SAMPLE_TOKENS = 256
"""Longest of them; their logits are kept in memory."""
GENERAL_TEXT = (
    "Write a short letter to a friend about a day in the mountains.",
    "What is the capital of France, and how many people live there?",
    "List three uses of a binary search tree.",
)
"""Texts to compare on when the adapter does not say its data set."""


def merge(config: MergeCommandConfig) -> Receipt:
    """Merge the adapter into its base, in fp32 and rounded once; print the receipt.

    Raises MergeError, with nothing left at `output`, when the merged model is too far from the adapted one.
    """
    disable_progress_bar()  # ours stands in place of transformers' bar
    output = Path(config.output)
    if output.suffix in (".gguf", ".safetensors"):
        raise ValueError(f"output={output}: merge writes a folder of that name; use export format=gguf for a GGUF file")
    with only_maker(output):
        check_unused(output)
        return merge_into(output, config)


def merge_into(output: Path, config: MergeCommandConfig) -> Receipt:
    """Merge into a folder that nobody else makes meanwhile."""
    config = replace(config, adapter_path=best_of_sweep(config.adapter_path))
    folder = tuned_folder(config.adapter_path)
    is_adapter = not is_whole_model(folder)
    base, _ = base_of(config.adapter_path, config.model)
    if is_adapter:
        check_has_room(folder, base)
    stored = stored_dtypes(base) if is_adapter else None
    precision = precision_of_change(folder, base)
    base_logits = None
    if is_adapter and changes_base(folder):
        base_logits = logits_of_base(config.adapter_path, config.model, precision)
    model, tokenizer = load_for_inference(config.adapter_path, config.model, precision)
    samples = sample_ids(saved_config(config.adapter_path), tokenizer, model_context(base))
    original, dtype = None, computing_dtype(model)
    rounded = config.merge.base is MergeBase.dequantised and stored is not None and set(stored) != {dtype}
    if config.merge.base is MergeBase.original or rounded:
        # The weights are not rounded through the dtype that the run computed in.
        original = load_model(base, None if stored is not None else dtype, device=inference_device())
    receipt = write_merged(model, tokenizer, output, samples, config.merge, original, base_logits)
    layout_of(config.adapter_path, tokenizer).save(output)
    copy_companions(base, output)
    if (lineage := read_lineage(folder)) is not None:
        write_card(output, folder.parent, lineage)
    else:
        write_card(output, lineage=lineage_of_peft(folder, base), knows_prompts=False)
    print(f"{output}: {receipt}")
    return receipt


def lineage_of_peft(folder: Path, base: ModelConfig) -> Lineage:
    """Return what can be told of an adapter that HF PEFT wrote: its method, and the base that it was merged into."""
    method = adapter_config_from_peft(folder).method
    created_by = f"lightning-peft merge, of a folder of HF PEFT ({folder.name})"
    return Lineage(source_fingerprint(base), model_name(base), method, created_by=created_by)


def logits_of_base(adapter_path: str, model: ModelConfig | None, precision: str = "auto") -> list[Tensor]:
    """Return the base's logits on the samples, for an adapter that has written over parts of the base."""
    base, _ = base_of(adapter_path, model)
    samples = sample_ids(saved_config(adapter_path), load_tokenizer(base), model_context(base))
    loaded = load_base(adapter_path, model, precision)
    return [logits_of(loaded, sample.to(loaded.device)) for sample in samples]


def sample_ids(
    saved: TrainConfig | None, tokenizer: PreTrainedTokenizerFast, context: int | None = None
) -> list[Tensor]:
    """Return token ids (1, T) of validation rows of the adapter's data set, else of `GENERAL_TEXT`, up to `context`."""
    longest = min(SAMPLE_TOKENS, context or SAMPLE_TOKENS)
    if saved is not None and (found := first_samples(saved.data, "validation", tokenizer, SAMPLES)):
        return [torch.tensor([sample.input_ids[:longest]]) for sample in found]
    conversations = [[Message("user", text), Message("assistant", "Of course.")] for text in GENERAL_TEXT]
    return [torch.tensor([encode(messages, tokenizer).input_ids[:longest]]) for messages in conversations]
