"""A LoRA as llama.cpp reads it: pairs in a GGUF file, tensor for tensor what its own converter writes."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_peft.models.gguf import GGUFFile
from lightning_peft.models.gguf_names import GGUFNames
from lightning_peft.serving.gguf_model import instead_of_pairs
from lightning_peft.serving.plain import FactorPairs, is_embedding

FILE_NAME = "adapter.gguf"


def check_pairs(pairs: FactorPairs, model: PreTrainedModel, tied: bool) -> None:
    """Raise ValueError for layers that llama.cpp takes no pair of; `tied` is whether the base's head is its embedding.

    The model's own configuration does not say so where the run has untied them.
    """
    instead = instead_of_pairs(model.config)
    for name in pairs:
        if is_embedding(model, name):
            raise ValueError(
                f"format=gguf_lora: {name} is an embedding, which llama.cpp adapts no pair of; use {instead}"
            )
        if model.get_submodule(name) is model.get_output_embeddings() and tied:
            raise ValueError(
                f"format=gguf_lora: {name} shares its weight with the embedding, and the base's file has no tensor of "
                f"its own for it; use {instead}"
            )


def write_gguf_lora(pairs: FactorPairs, model: PreTrainedModel, path: Path, name: str) -> None:
    """Write pairs of layers of `model` to a GGUF file, fp32; alpha is the rank, as the scaling is in B."""
    from gguf import GGUFWriter  # only GGUF files need the package

    names = GGUFNames(model.config)
    rank = len(next(iter(pairs.values()))[0])
    writer = GGUFWriter(path, names.architecture)
    writer.add_type("adapter")
    writer.add_name(name)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    for layer, (A, B) in pairs.items():
        stored = names.of(f"{layer}.weight")
        writer.add_tensor(f"{stored}.lora_a", A.numpy())
        writer.add_tensor(f"{stored}.lora_b", names.laid_out(layer, B).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf_lora(path: Path, model: PreTrainedModel, layers: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the pairs of a file for these layers of `model`, the scaling in B. Raises ValueError for other tensors."""
    file, names = GGUFFile(path), GGUFNames(model.config)
    found = {}
    for layer in layers:
        stored = names.of(f"{layer}.weight")
        A, B = (file.read(f"{stored}.lora_{part}", torch.float32) for part in "ab")
        found[layer] = A, names.ours(layer, B) * (file.fields["adapter.lora.alpha"] / len(A))
    if len(file.tensors) != 2 * len(found):
        raise ValueError(f"{path}: holds {len(file.tensors)} tensors, not the {2 * len(found)} of {len(found)} layers")
    return found
