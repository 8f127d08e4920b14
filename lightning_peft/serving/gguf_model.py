"""A whole model as a GGUF file: weights, and the metadata that llama.cpp and Ollama run it by."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lightning_peft.data.layout import PromptLayout
from lightning_peft.models.gguf import open_gguf
from lightning_peft.models.gguf_conversion import ARCHITECTURES, ROPE_FACTORS
from lightning_peft.serving.gguf_names import GGUFNames
from lightning_peft.serving.gguf_tokenizer import GGUFModelError, add_tokenizer
from lightning_peft.serving.prompt import template_as_trained

logger = logging.getLogger(__name__)

FILE_NAME = "model.gguf"
DTYPES = {"fp32": "F32", "bf16": "BF16", "q8_0": "Q8_0"}
"""Values of `dtype=`, in llama.cpp's words; vectors are fp32 always."""
FILE_TYPES = {"fp32": "ALL_F32", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
STOPS = ("eos", "eot", "eom")
"""Names of the tokens at which llama.cpp ends an answer: of a sequence, of a turn, of a message."""
OWN_KEYS = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture", "general.file_type",
            "general.quantization_version", "tokenizer.chat_template")  # fmt: skip
"""Keys that are not copied from the base's file."""


def instead_of_pairs(model_type: str) -> str:
    """Return the ways to write base and adapter in one, where pairs alone will not do."""
    return "format=gguf, or `lightning-peft merge`" if is_known(model_type) else "`lightning-peft merge`"


def is_known(model_type: str) -> bool:
    return model_type in (*ARCHITECTURES.values(), "mistral")


def check_family(model_type: str) -> None:
    """Raise GGUFModelError for an architecture whose metadata is not known here."""
    if not is_known(model_type):
        raise GGUFModelError(
            f"format=gguf: the metadata of {model_type} is not known here, only that of "
            f"{', '.join((*ARCHITECTURES.values(), 'mistral'))}; `lightning-peft merge` and llama.cpp's "
            "convert_hf_to_gguf.py do it"
        )


def write_gguf_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    layout: PromptLayout,
    path: Path,
    dtype: str,
    base_file: Path | None,
    name: str,
) -> None:
    """Write a model without adapters to a GGUF file, its matrices in a dtype of `DTYPES`.

    The metadata are those of `base_file`, the base's own GGUF file, where there is one. The chat template is the one
    trained with, its system prompt in it. Raises GGUFModelError for what cannot be said in such a file.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quants  # only GGUF files need the package

    check_family(str(model.config.model_type))
    if (window := attention_window(model)) is not None:
        logger.warning(
            "%s: this model attends to the last %d tokens, llama.cpp to all: answers to longer texts differ",
            path.name, window,
        )  # fmt: skip
    names = GGUFNames(model)
    writer = GGUFWriter(path, names.architecture)
    writer.add_file_type(LlamaFileType[FILE_TYPES[dtype]])
    writer.add_quantization_version(2)
    if base_file is not None:
        copy_metadata(writer, base_file, len(tokenizer))
        fields = open_gguf(base_file).fields
        named = {key: fields[place] for key in STOPS if (place := f"tokenizer.ggml.{key}_token_id") in fields}
    else:
        writer.add_name(name)
        add_architecture(writer, model)
        add_tokenizer(writer, tokenizer, int(model.get_input_embeddings().weight.shape[0]))  # type: ignore[union-attr,index]
        named = {} if tokenizer.eos_token_id is None else {"eos": tokenizer.eos_token_id}
    add_stops(writer, layout, named)
    if (template := template_as_trained(layout, tokenizer)) is not None:
        writer.add_chat_template(template)

    def kind_of(tensor: Tensor) -> Any:
        return GGMLQuantizationType.F32 if tensor.ndim == 1 else GGMLQuantizationType[DTYPES[dtype]]

    found = dict(stored_tensors(model, names))
    if base_file is not None and ROPE_FACTORS in (base := open_gguf(base_file)).tensors:
        found[ROPE_FACTORS] = base.read(ROPE_FACTORS, torch.float32)
    for stored, tensor in found.items():
        if dtype == "q8_0" and tensor.ndim == 2 and tensor.shape[1] % 32:
            raise GGUFModelError(
                f"dtype=q8_0: {stored} has rows of {tensor.shape[1]}, not a multiple of 32; dtype=bf16"
            )
        # Sizes come first: the file is then written a tensor at a time.
        data = quants.quantize(np.zeros((1, *tensor.shape[1:]), np.float32), kind_of(tensor))
        shape = (tensor.shape[0], *data.shape[1:]) if tensor.ndim == 2 else tuple(tensor.shape)
        size = int(np.prod(shape)) * data.dtype.itemsize
        plain = kind_of(tensor) is GGMLQuantizationType.F32
        writer.add_tensor_info(stored, shape, data.dtype, size, None if plain else kind_of(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in found.values():
        writer.write_tensor_data(quants.quantize(tensor.float().cpu().contiguous().numpy(), kind_of(tensor)))
    writer.close()


def attention_window(model: PreTrainedModel) -> int | None:
    """Return the tokens that a sliding window of the model reaches over; None where all layers attend to everything."""
    config: Any = model.config
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    # Mistral's layers have no kinds, and Llama's and Qwen's without kinds have no window.
    slides = "sliding_attention" in kinds if kinds else config.model_type == "mistral"
    return int(window) if window is not None and slides else None


def stored_tensors(model: PreTrainedModel, names: GGUFNames) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the file with its name: the parameters, a tied head's once, and Llama 3's frequencies."""
    for name, parameter in model.named_parameters():
        yield names.of(name), names.laid_out(name, parameter.detach())
    rope: dict[str, Any] = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "llama3":
        width = head_dim(model)
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
        plain = float(rope["rope_theta"]) ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
        yield ROPE_FACTORS, plain / scaled


def head_dim(model: PreTrainedModel) -> int:
    config: Any = model.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def copy_metadata(writer: Any, base_file: Path, tokens: int) -> None:
    """Take the metadata of the base's own file, in the types it has them in."""
    from gguf import GGUFReader, GGUFValueType

    for key, entry in GGUFReader(base_file).fields.items():
        if key in OWN_KEYS:
            continue
        kind, *inner = entry.types
        value = entry.contents()
        if key == "tokenizer.ggml.tokens" and len(value) < tokens:
            raise GGUFModelError(
                f"format=gguf: the run added {tokens - len(value)} tokens to those of {base_file.name}"
            )
        if kind == GGUFValueType.ARRAY:
            writer.add_key_value(key, value, kind, sub_type=inner[0])
        else:
            writer.add_key_value(key, value, kind)


def add_architecture(writer: Any, model: PreTrainedModel) -> None:
    """Add the sizes of a model, and how it encodes positions."""
    from gguf import RopeScalingType

    config: Any = model.config
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if config.model_type == "qwen3" and config.attention_bias:
        raise GGUFModelError("format=gguf: llama.cpp's qwen3 has no attention_bias; use merge")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(model))
    writer.add_value_length(head_dim(model))
    writer.add_rope_dimension_count(head_dim(model))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(int(model.get_input_embeddings().weight.shape[0]))  # type: ignore[union-attr,index]
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        if kind == "yarn":
            add_yarn(writer, rope)
    elif kind not in ("default", "llama3"):
        raise GGUFModelError(f"format=gguf: positions scaled by {kind} are not written here; use merge")


def add_yarn(writer: Any, rope: dict[str, Any]) -> None:
    """Add what YaRN goes by. Raises GGUFModelError for what llama.cpp computes in its own way."""
    own = {key: rope[key] for key in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(key) is not None}
    if rope.get("truncate") is False:
        own["truncate"] = False
    if own:
        shown = ", ".join(f"{key}={value}" for key, value in own.items())
        raise GGUFModelError(f"format=gguf: positions scaled by yarn with {shown} are not written here; use merge")
    writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    for key in ("beta_fast", "beta_slow"):
        if rope.get(key) is not None:
            getattr(writer, f"add_rope_scaling_yarn_{key}")(float(rope[key]))


def add_stops(writer: Any, layout: PromptLayout, named: Mapping[str, int]) -> None:
    """Add the tokens at which a trained answer ends, in the places of `STOPS` that are not `named` already."""
    others = [number for number in layout.stop_token_ids if number not in named.values()]
    free = [key for key in STOPS if key not in named]
    for key, number in zip(free, others, strict=False):
        getattr(writer, f"add_{key}_token_id")(number)
    if left := others[len(free) :]:
        logger.warning("answers end at the tokens %s too, and a GGUF file has no place for more stop tokens", left)
