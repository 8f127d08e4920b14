"""llama.cpp's names and layout of a model's tensors, there and back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from lightning_peft.models.gguf_families import FAMILIES


@dataclass(frozen=True)
class Parts:
    """The tensors of a file that hold one parameter of transformers."""

    names: tuple[str, ...]
    """Their ends, in place of the parameter's."""
    split: Callable[[Tensor], Sequence[Tensor]] = lambda tensor: (tensor,)
    join: Callable[[Sequence[Tensor]], Tensor] = lambda parts: parts[0]


def in_turns(parts: Sequence[Tensor]) -> Tensor:
    """Return the slices of two tensors (experts, slices, ...) in turns."""
    return torch.stack(tuple(parts), 2).flatten(1, 2)


STACKED = {
    "experts.gate_up_proj": Parts(
        ("experts.gate_proj.weight", "experts.up_proj.weight"),
        lambda both: both.chunk(2, 1),
        lambda parts: torch.cat(tuple(parts), 1),
    ),
    "experts.down_proj": Parts(("experts.down_proj.weight",)),
}
"""Experts in one parameter, (experts, rows, columns): gate above up."""
IN_TURNS = {
    "experts.gate_up_proj": Parts(
        ("experts.gate_proj.weight", "experts.up_proj.weight"),
        lambda both: (both.mT[:, ::2], both.mT[:, 1::2]),
        lambda parts: in_turns(parts).mT,
    ),
    "experts.gate_up_proj_bias": Parts(
        ("experts.gate_proj.bias", "experts.up_proj.bias"),
        lambda both: (both[:, ::2], both[:, 1::2]),
        in_turns,
    ),
    "experts.down_proj": Parts(
        ("experts.down_proj.weight",), lambda tensor: (tensor.mT,), lambda parts: parts[0].mT
    ),
    "experts.down_proj_bias": Parts(("experts.down_proj.bias",)),
    "self_attn.sinks": Parts(("self_attn.sinks.weight",)),
}  # fmt: skip
"""GPT-OSS's experts, (experts, columns, rows): rows of gate and up in turns."""


SAVED_AS = {
    "block_sparse_moe.experts.": "mlp.experts.",
    "block_sparse_moe.router.": "block_sparse_moe.router.layer.",
}
"""Parts of names: those in models' files, which llama.cpp's table has."""


class GGUFNames:
    """The names of one model's tensors in a GGUF file. Raises ValueError for a family that is not in `FAMILIES`."""

    def __init__(self, config: PreTrainedConfig):
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map  # only GGUF files need the package

        sizes: Any = config
        if config.model_type not in FAMILIES:
            raise ValueError(
                f"format=gguf_lora: llama.cpp's layout of {config.model_type} is not known here; these are: "
                f"{', '.join(FAMILIES)}. format=plain and llama.cpp's convert_lora_to_gguf.py do it"
            )
        self.family = FAMILIES[config.model_type]
        self.architecture = self.family.architecture
        numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
        self.names = get_tensor_name_map(numbers[self.architecture], sizes.num_hidden_layers)
        self.parts: Mapping[str, Parts] = IN_TURNS if config.model_type == "gpt_oss" else STACKED
        self.heads: dict[str, int] = {}
        if self.family.is_permuted:
            self.heads = {"q_proj": sizes.num_attention_heads, "k_proj": sizes.num_key_value_heads}

    def of(self, name: str) -> str:
        """Return llama.cpp's name of a parameter that is one tensor there too."""
        for part, saved in SAVED_AS.items():
            name = name.replace(part, saved)
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"llama.cpp has no tensor for {name}")
        return str(found)

    def stored(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return the tensors of a file that hold a parameter, by name."""
        parts = self._parts(name)
        if parts is None:
            return {self.of(name): self.laid_out(name, tensor)}
        named, split = self._named(name, parts), parts.split(tensor)
        return dict(zip(named, split, strict=True))

    def sources(self, name: str) -> list[str]:
        """Return the names of the tensors that hold a parameter."""
        parts = self._parts(name)
        return [self.of(name)] if parts is None else self._named(name, parts)

    def joined(self, name: str, tensors: Sequence[Tensor]) -> Tensor:
        """Return a parameter, of the tensors of `sources`."""
        parts = self._parts(name)
        return self.ours(name, tensors[0]) if parts is None else parts.join(tensors)

    def laid_out(self, name: str, tensor: Tensor) -> Tensor:
        """Return a weight, a bias or a B as llama.cpp has it: rows in its order, norms with their 1."""
        if self._is_norm(name):
            return tensor.float() + 1
        heads = self._heads(name)
        return tensor if heads is None else pairs_from_halves(tensor, heads)

    def ours(self, name: str, tensor: Tensor) -> Tensor:
        """Undo `laid_out`."""
        if self._is_norm(name):
            return tensor - 1
        heads = self._heads(name)
        return tensor if heads is None else halves_from_pairs(tensor, heads)

    def _parts(self, name: str) -> Parts | None:
        return next((parts for end, parts in self.parts.items() if name.endswith(f".{end}")), None)

    def _named(self, name: str, parts: Parts) -> list[str]:
        end = next(end for end, each in self.parts.items() if each is parts)
        return [self.of(name.removesuffix(end) + part) for part in parts.names]

    def _is_norm(self, name: str) -> bool:
        return self.family.adds_one and name.endswith("norm.weight")

    def _heads(self, name: str) -> int | None:
        return next((self.heads[part] for part in name.split(".") if part in self.heads), None)


def halves_from_pairs(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head from llama.cpp's order (rotary pairs) to transformers' (the two halves apart)."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def pairs_from_halves(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head from transformers' order to llama.cpp's: the inverse of `halves_from_pairs`."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)
