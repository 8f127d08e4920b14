"""A whole model as a GGUF file: weights, and the metadata that llama.cpp and Ollama run it by."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from lightning_peft.data.layout import PromptLayout
from lightning_peft.models.gguf import open_gguf
from lightning_peft.models.gguf_config import gguf_config
from lightning_peft.models.gguf_conversion import OF_POSITIONS, is_known
from lightning_peft.models.gguf_families import FAMILIES, GGUFModelError
from lightning_peft.models.gguf_metadata import SLIDING, check_written, fields_of, position_tensors, ropes
from lightning_peft.models.gguf_names import GGUFNames
from lightning_peft.serving.gguf_tokenizer import add_tokenizer, name_for
from lightning_peft.serving.prompt import template_as_trained

logger = logging.getLogger(__name__)

FILE_NAME = "model.gguf"
DTYPES = {"fp32": "F32", "bf16": "BF16", "q8_0": "Q8_0"}
"""Values of `dtype=`, in llama.cpp's words; vectors are fp32 always."""
FILE_TYPES = {"fp32": "ALL_F32", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
ALWAYS_FP32 = ("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")
"""Ends of matrices that are fp32 always: norms of heads, and routers."""
WITHOUT_KINDS = ("mistral", "mixtral", "qwen3_moe", "phi3", "starcoder2")
"""Model types that have one window in all layers."""
STOPS = ("eos", "eot", "eom")
"""Names of the tokens at which llama.cpp ends an answer: of a sequence, of a turn, of a message."""
OWN_KEYS = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture", "general.file_type",
            "general.quantization_version", "tokenizer.chat_template")  # fmt: skip
"""Keys that are not copied from the base's file."""


def instead_of_pairs(config: PreTrainedConfig) -> str:
    """Return the ways to write base and adapter in one, where pairs alone will not do."""
    text: Any = config.get_text_config()
    try:
        check_written(text, bool(text.tie_word_embeddings), has_metadata=False)
    except GGUFModelError:
        return "`lightning-peft merge`"
    return "format=gguf, or `lightning-peft merge`"


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

    config = model.config.get_text_config()
    own = base_file if keeps_positions(config, base_file) else None
    check_written(config, is_tied(model), own is not None)
    for line in differences(model, config):
        logger.warning("%s: %s", path.name, line)
    names = GGUFNames(config)
    writer = GGUFWriter(path, names.architecture)
    writer.add_file_type(LlamaFileType[FILE_TYPES[dtype]])
    writer.add_quantization_version(2)
    if base_file is not None:
        copy_metadata(writer, base_file, len(tokenizer), (f"{names.architecture}.",) if own is None else ())
        if own is None:
            add_fields(writer, fields_of(config))
        fields = open_gguf(base_file).fields
        named = {key: fields[place] for key in STOPS if (place := f"tokenizer.ggml.{key}_token_id") in fields}
    else:
        writer.add_name(name_for(tokenizer, name))
        add_fields(writer, fields_of(config))
        add_tokenizer(writer, tokenizer, int(model.get_input_embeddings().weight.shape[0]))  # type: ignore[union-attr,index]
        named = {} if tokenizer.eos_token_id is None else {"eos": tokenizer.eos_token_id}
    add_stops(writer, layout, named)
    if (template := template_as_trained(layout, tokenizer)) is not None:
        writer.add_chat_template(template)

    def kind_of(stored: str, tensor: Tensor) -> Any:
        is_matrix = tensor.ndim > 1 and stored.endswith(".weight") and not stored.endswith(ALWAYS_FP32)
        return GGMLQuantizationType[DTYPES[dtype]] if is_matrix else GGMLQuantizationType.F32

    places = places_of(model, names, own)
    for stored, read in places.items():
        tensor = read()
        kind = kind_of(stored, tensor)
        if kind is GGMLQuantizationType.Q8_0 and tensor.shape[-1] % 32:
            raise GGUFModelError(
                f"dtype=q8_0: {stored} has rows of {tensor.shape[-1]}, not a multiple of 32; dtype=bf16"
            )
        # Sizes come first: the file is then written a tensor at a time.
        data = quants.quantize(np.zeros((1, tensor.shape[-1]), np.float32), kind)
        shape = (*tensor.shape[:-1], data.shape[-1])
        size = int(np.prod(shape)) * data.dtype.itemsize
        writer.add_tensor_info(stored, shape, data.dtype, size, None if kind is GGMLQuantizationType.F32 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for stored, read in places.items():
        tensor = read()
        writer.write_tensor_data(quants.quantize(tensor.float().cpu().contiguous().numpy(), kind_of(stored, tensor)))
    writer.close()


def differences(model: PreTrainedModel, config: Any) -> list[str]:
    """Return what a file lacks of a model whose text is of `config`, or llama.cpp computes otherwise, a line each."""
    lines = []
    if left := len(list(model.parameters())) - len(text_parameters(model)):
        lines.append(
            f"the file is of text alone: {left} weights of what sees or hears are left out, which llama.cpp has in a "
            "file of their own (mmproj)"
        )
    if (window := attention_window(config)) is not None:
        lines.append(
            f"this model attends to the last {window} tokens, llama.cpp to all: answers to longer texts differ"
        )
    rope, _ = ropes(config)
    if rope.get("rope_type") == "longrope" and rope["long_factor"] != rope["short_factor"]:
        lines.append(
            "llama.cpp turns positions by the long factors wherever its context (-c) is longer than "
            f"{config.original_max_position_embeddings} tokens, this model where the text is: keep -c below for short "
            "texts"
        )
    if rope.get("rope_type") == "yarn" and rope.get("truncate") is False:
        lines.append(
            "llama.cpp rounds the bounds of YaRN, this model does not (truncate=false): logits differ a little"
        )
    return lines


def attention_window(config: Any) -> int | None:
    """Return the tokens that a window of the model reaches over and llama.cpp lacks; None where both see the same."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if window is None or FAMILIES[config.model_type].period is not None:
        return None
    # Llama's and Qwen's layers without kinds have no window.
    slides = SLIDING in kinds if kinds else config.model_type in WITHOUT_KINDS
    return int(window) if slides else None


def is_tied(model: PreTrainedModel) -> bool:
    """Return whether the head is the embedding."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is embedding.weight


def text_parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the parameters that read and write text, by the names that they have in a model of text alone."""
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    if model.config.get_text_config() is model.config:
        return parameters
    decoder = model.get_decoder()
    (prefix,) = [name for name, part in model.named_modules() if part is decoder]
    head = {name: each for name, each in parameters.items() if name.startswith("lm_head.")}
    text = {name: each for name, each in parameters.items() if name.startswith(f"{prefix}.")}
    return {f"model.{name.removeprefix(prefix + '.')}": each for name, each in text.items()} | head


def places_of(model: PreTrainedModel, names: GGUFNames, base_file: Path | None) -> dict[str, Callable[[], Tensor]]:
    """Return every tensor of the file by name, made when it is asked for.

    They are the parameters, a tied head's once where the family allows it, and what says how positions are scaled.
    """
    parameters = text_parameters(model)
    if names.family.head == "own" and is_tied(model):
        parameters["lm_head.weight"] = parameters["model.embed_tokens.weight"]
    places: dict[str, Callable[[], Tensor]] = {}
    for name, parameter in parameters.items():
        for stored in names.sources(name):
            places[stored] = partial(_part, names, name, parameter.detach(), stored)
    if base_file is None:
        of_positions = dict(position_tensors(model.config.get_text_config()))
    else:
        base = open_gguf(base_file)
        of_positions = {name: base.read(name, torch.float32) for name in OF_POSITIONS if name in base.tensors}
    return places | {name: partial(torch.clone, tensor) for name, tensor in of_positions.items()}


def _part(names: GGUFNames, name: str, parameter: Tensor, stored: str) -> Tensor:
    return names.stored(name, parameter)[stored]


def keeps_positions(config: Any, base_file: Path | None) -> bool:
    """Return whether the base has a file of its own, and the run has left its positions as that says."""
    if base_file is None:
        return False
    file = open_gguf(base_file)
    return not is_known(file) or bool(gguf_config(file).rope_parameters == config.rope_parameters)


def copy_metadata(writer: Any, base_file: Path, tokens: int, without: tuple[str, ...]) -> None:
    """Take the metadata of the base's own file, in the types it has them in; none whose key begins with `without`."""
    from gguf import GGUFReader, GGUFValueType

    for key, entry in GGUFReader(base_file).fields.items():
        if key in OWN_KEYS or key.startswith(without):
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


def add_fields(writer: Any, fields: Mapping[str, Any]) -> None:
    """Add the fields of an architecture, each in the type that its value has."""
    for key, value in fields.items():
        name = f"{writer.arch}.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)


def add_stops(writer: Any, layout: PromptLayout, named: Mapping[str, int]) -> None:
    """Add the tokens at which a trained answer ends, in the places of `STOPS` that are not `named` already."""
    others = [number for number in layout.stop_token_ids if number not in named.values()]
    free = [key for key in STOPS if key not in named]
    for key, number in zip(free, others, strict=False):
        getattr(writer, f"add_{key}_token_id")(number)
    if left := others[len(free) :]:
        logger.warning("answers end at the tokens %s too, and a GGUF file has no place for more stop tokens", left)
