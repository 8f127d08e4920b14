"""The weights of a GGUF file for transformers.

transformers converts a GGUF file in 10 to 40 seconds for SmolLM2-135M; this takes about one and gives the same weights
bit for bit. A file with anything that is not known here is left to transformers.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from lightning_peft.models.gguf import GGUFFile, open_gguf
from lightning_peft.models.gguf_config import gguf_config, rope_scaling
from lightning_peft.models.gguf_families import FAMILIES, model_type_of
from lightning_peft.models.gguf_fields import check_fields
from lightning_peft.models.gguf_metadata import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS
from lightning_peft.models.gguf_names import GGUFNames

OF_POSITIONS = (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)
"""Tensors that are no weights, but say how positions are scaled."""


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
