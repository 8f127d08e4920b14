"""A low-rank adapter as every engine computes it: scaling in B, one rank for all layers, alpha equal to the rank."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_peft.adapters.base import LowRank
from lightning_peft.adapters.combine import Cut, cut, cut_dense
from lightning_peft.adapters.inject import adapters, inject_adapters
from lightning_peft.adapters.lora import LoRAConfig, LoRAEmbedding, LoRALinear
from lightning_peft.checkpoint.lineage import EXPORTED_BY, Lineage, write_lineage
from lightning_peft.checkpoint.peft_format import WEIGHTS_NAME, file_sha256
from lightning_peft.checkpoint.peft_words import CONFIG_NAME, PREFIX, target_words

FactorPairs = Mapping[str, tuple[Tensor, Tensor]]
"""Layer -> A (rank, in_features) and B (out_features, rank), fp32, one rank for all; the change is B A."""


class NotLowRankError(ValueError):
    """An adapter whose change is no low-rank sum, which a file of pairs cannot hold."""


def plain_pairs(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the adapters of a model as plain pairs. Raises NotLowRankError for a layer that is no low-rank sum."""
    layers: dict[str, LowRank] = {}
    for name, layer in adapters(model):
        if (change := layer.low_rank()) is None:
            raise NotLowRankError(f"{type(layer).__name__} at {name} is no low-rank sum: use `lightning-peft merge`")
        layers[name] = change
    rank = max(len(change.A) for change in layers.values())
    return {name: padded(change.A.cpu(), change.scaling * change.B.cpu(), rank) for name, change in layers.items()}


@torch.no_grad()
def cut_pairs(model: nn.Module, rank: int) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float]]:
    """Return the adapters of a model as plain pairs of one rank, and the share of each layer's energy that is lost.

    Raises NotLowRankError for a layer that changes a bias, or is no linear layer.
    """
    pairs, lost = {}, {}
    for name, layer in adapters(model):
        change = layer.low_rank()
        if change is None and (layer.delta_bias() is not None or isinstance(layer.base_layer, nn.Embedding)):
            raise NotLowRankError(
                f"{type(layer).__name__} at {name} changes more than a linear weight: use `lightning-peft merge`"
            )
        to = Cut(rank)
        cut_change, lost[name] = cut_dense(layer.delta_weight().float(), to) if change is None else cut(change, to)
        pairs[name] = padded(cut_change.A.cpu(), cut_change.B.cpu(), rank)
    return pairs, lost


def padded(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return a pair with rows and columns of zeros up to a rank."""
    missing = rank - len(A)
    return nn.functional.pad(A, (0, 0, 0, missing)).contiguous(), nn.functional.pad(B, (0, missing)).contiguous()


def write_plain(
    pairs: FactorPairs, model: PreTrainedModel, folder: Path, base_name: str, lineage: Lineage | None
) -> None:
    """Write pairs of layers of `model` into `folder` as HF PEFT's LoRA, and the lineage of the run they come from."""
    rank = len(next(iter(pairs.values()))[0])
    words = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "target_modules": target_words(model, list(pairs)),
        "modules_to_save": None,
        "fan_in_fan_out": any(isinstance(layer.base_layer, Conv1D) for _, layer in adapters(model)),
        "init_lora_weights": True,
        "inference_mode": True,
    }
    tensors: dict[str, Tensor] = {}
    for name, (A, B) in pairs.items():
        ends = ("embedding_A", "embedding_B") if is_embedding(model, name) else ("A.weight", "B.weight")
        tensors |= {f"{PREFIX}{name}.lora_{end}": factor for end, factor in zip(ends, (A, B), strict=True)}
    (folder / CONFIG_NAME).write_text(json.dumps(words, indent=2, sort_keys=True) + "\n")
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    if lineage is not None:
        checksum = file_sha256(folder / WEIGHTS_NAME)
        exported = replace(lineage, method="lora", adapter_sha256=checksum, created_by=EXPORTED_BY)
        write_lineage(exported, folder)


def is_embedding(model: nn.Module, name: str) -> bool:
    return isinstance(getattr(model.get_submodule(name), "base_layer", None), nn.Embedding)


@torch.no_grad()
def inject_pairs(model: nn.Module, pairs: FactorPairs) -> None:
    """Put pairs into a fresh base as a LoRA whose scaling is one."""
    rank = len(next(iter(pairs.values()))[0])
    inject_adapters(model, LoRAConfig(rank=rank, alpha=rank, target_modules=list(pairs)))
    for name, layer in adapters(model):
        A, B = pairs[name]
        if isinstance(layer, LoRALinear):
            layer.set_factors(A, B)
        else:
            assert isinstance(layer, LoRAEmbedding)
            layer.lora_embedding_A.copy_(A)
            layer.lora_embedding_B.copy_(B)
