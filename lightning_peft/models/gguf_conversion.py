"""A GGUF file for transformers: its weights, and its tokenizer.

transformers converts a GGUF file in 10 to 40 seconds for SmolLM2-135M; this takes about one and gives the same weights
bit for bit. A file with anything that is not known here is left to transformers.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from lightning_peft.models.gguf import GGUFFile, open_gguf
from lightning_peft.models.gguf_config import TOKEN_KEYS, gguf_config, rope_scaling
from lightning_peft.models.gguf_families import FAMILIES, model_type_of
from lightning_peft.models.gguf_fields import check_fields
from lightning_peft.models.gguf_metadata import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS
from lightning_peft.models.gguf_names import GGUFNames

PRE_TOKENIZERS = {
    "smollm": lambda: [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
}
"""The steps that split text before byte-pair merging, by tokenizer.ggml.pre."""

OF_POSITIONS = (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)
"""Tensors that are no weights, but say how positions are scaled."""
CONTROL = 3
"""Token type of special tokens."""


def open_model(path: str | Path) -> GGUFFile:
    """Return the file of a whole model. Raises ValueError for one of something else, or of a part."""
    file = open_gguf(path)
    if (kind := file.fields.get("general.type", "model")) != "model":
        raise ValueError(f"model.path={path}: holds no model but what it calls {kind}; give the file of its base")
    if (parts := file.fields.get("split.count", 1)) > 1:
        raise ValueError(
            f"model.path={path}: is one of {parts} parts of a model; put them together by llama-gguf-split --merge"
        )
    return file


def is_known(file: GGUFFile) -> bool:
    """Return whether every tensor and the position encoding of the file are ones of a family that is read here."""
    scaling, _ = rope_scaling(file)
    if (model_type := model_type_of(file.fields)) is None or scaling not in ("none", "linear", "yarn"):
        return False
    known = tensor_names(FAMILIES[model_type].architecture)
    return all(re.sub(r"^blk\.\d+\.|\.(weight|bias)$", "", name) in known for name in file.tensors)


def tensor_names(architecture: str) -> set[str]:
    """Return what llama.cpp calls the tensors of an architecture, without the number of a block."""
    from gguf import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES  # only GGUF files need the package

    numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    names = {TENSOR_NAMES[tensor].removeprefix("blk.{bid}.") for tensor in MODEL_TENSORS[numbers[architecture]]}
    return names | {name.removesuffix(".weight") for name in OF_POSITIONS}


def check_read(file: GGUFFile, model: PreTrainedModel) -> None:
    """Raise ValueError for what a file holds and transformers, which is to read it into `model`, passes over.

    Also for what `model` needs and the file lacks, which transformers draws at random. A model on the meta device will
    do.
    """
    scaling, _ = rope_scaling(file)
    if scaling != "none":
        raise ValueError(
            f"model.path={file.path}: transformers does not read its {scaling} scaling of positions; use the model's "
            "safetensors files"
        )
    processor = TENSOR_PROCESSORS.get(str(file.fields.get("general.architecture")), TensorProcessor)(config={})
    read = get_gguf_hf_weights_map(model, processor)
    if unread := [name for name in file.tensors if not {name, name.removesuffix(".weight")} & read.keys()]:
        raise ValueError(
            f"model.path={file.path}: transformers does not read {len(unread)} of its tensors, such as {unread[0]}: "
            "use the model's safetensors files"
        )
    if lacking := _lacking(file, model, read):
        raise ValueError(
            f"model.path={file.path}: lacks {len(lacking)} weights of {type(model).__name__}, such as {lacking[0]}; "
            "fetch the file again, or use the model's safetensors files"
        )
    check_fields(file, model.config)


def _lacking(file: GGUFFile, model: PreTrainedModel, read: Mapping[str, str]) -> list[str]:
    """Return the parameters that no tensor of the file fills, or not all that make it; `read` names them by tensor."""
    sources: dict[str, list[bool]] = {}
    for tensor, name in read.items():
        sources.setdefault(name, []).append(bool({tensor, f"{tensor}.weight"} & file.tensors.keys()))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    filled = {id(parameters[name]) for name, found in sources.items() if name in parameters and all(found)}
    return [name for name, parameter in parameters.items() if id(parameter) not in filled]


def check_has_places(file: GGUFFile, model: PreTrainedModel) -> None:
    """Raise ValueError for a tensor of a known file that the built model has no parameter for, such as a bias."""
    names = GGUFNames(model.config)
    places = {stored for name, _ in model.named_parameters() for stored in names.sources(name)}
    if lost := [name for name in file.tensors if name not in places and name not in OF_POSITIONS]:
        raise ValueError(
            f"model.path={file.path}: {type(model).__name__} has no place for {len(lost)} of its tensors, such as "
            f"{lost[0]}: use the model's safetensors files"
        )


class GGUFSource:
    """The weights of a known file under transformers' parameter names."""

    def __init__(self, file: GGUFFile):
        self.file = file
        config = gguf_config(file)
        self.stored = GGUFNames(config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        self.sources = {
            name: sources
            for name, _ in model.named_parameters()
            if file.tensors.keys() >= set(sources := self.stored.sources(name))
        }

    def names(self) -> list[str]:
        return list(self.sources)

    def read(self, name: str, dtype: torch.dtype | None) -> Tensor:
        wanted = dtype or torch.float32
        exact = (
            torch.float32 if self.stored.family.adds_one else wanted
        )  # what is taken away again is more than is left
        tensors = [self.file.read(stored, exact) for stored in self.sources[name]]
        return self.stored.joined(name, tensors).to(wanted)


def gguf_tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast | None:
    """Return the tokenizer, from the file's metadata; None for a kind not listed here."""
    field = partial(_tokenizer_field, file)
    if field("model") != "gpt2" or field("pre") not in PRE_TOKENIZERS:
        return None
    tokens = field("tokens")
    merges = [tuple(merge.split(" ")) for merge in field("merges") or [] if " " in merge]  # else it stands for none
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[field("pre")]())
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, field("token_type"), strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    named = {name: tokens[number] for name, key in TOKEN_KEYS.items() if (number := field(key)) is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=file.fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        additional_special_tokens=[token for token in special if token not in named.values()],
        add_bos_token=field("add_bos_token") or False,
        **named,
    )


def _tokenizer_field(file: GGUFFile, key: str) -> Any:
    return file.fields.get(f"tokenizer.ggml.{key}")
