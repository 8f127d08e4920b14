"""Everything a method says about itself: one row, `METHOD` in its own file; `registry.METHODS` collects the rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.adapters.base import Adapter, AdapterConfig, StepSchedule
from lightning_peft.quantization.linear import QuantizedLinear

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class PeftSpelling:
    """HF PEFT's spelling of a method."""

    peft_type: str
    tensors: tuple[str, ...]
    """Endings of the tensor names of one layer; dimension 0 of the first that a layer has is its rank."""
    options: dict[str, str] = field(default_factory=dict)
    """Field of our config -> HF's word."""
    flags: dict[str, bool] = field(default_factory=dict)
    """HF's words that tell this method from others of the same type."""
    constants: dict[str, Any] = field(default_factory=dict)
    """HF's words that are always written alike."""
    rank_word: str | None = "r"
    """HF's word for the rank; None where the tensors do not tell it."""
    alpha_word: str | None = None
    rank_offset: float = 0.0
    """The number that HF adds to the rank to divide alpha by."""
    patterns: tuple[str, ...] = ()
    """The ones among rank_pattern and alpha_pattern that HF knows for this type."""
    in_peft: bool = True
    """False when HF has no such method, so that only we can read the folder."""
    shared_file: str = ""
    """File beside HF's for what the layers share, where HF's has no place for it; a folder without it is another
    method's."""
    is_read: bool = True
    """False where the folder is one of another method, which reads it."""
    write_more: Callable[[Mapping[str, Adapter], dict[str, Any]], dict[str, Any]] | None = None
    """(layers by name, HF's words so far) -> HF's words that depend on the layers."""
    read_more: Callable[[Mapping[str, Any], Shapes], dict[str, Any]] | None = None
    """(HF's words, shapes by layer name) -> fields of our config that depend on them."""

    @property
    def is_low_rank(self) -> bool:
        """Return whether the file holds low-rank pairs alone, which every engine with LoRA computes."""
        return self.peft_type == "LORA" and not self.flags.get("use_dora", False)

    def word_of(self, config: AdapterConfig, word: str) -> Any:
        """Return the value that HF's word has for a config; None where the method does not spell it."""
        field_ = next((ours for ours, theirs in self.options.items() if theirs == word), None)
        return None if field_ is None else getattr(config, field_)


@dataclass(frozen=True)
class Contract:
    """The numbers that the contract suite holds a method to, beside those for all methods."""

    options: dict[str, Any] = field(default_factory=dict)
    """Options that suit a small model of width 64 with rank 4."""
    trained: Callable[[Any], int] = lambda target: 0
    """(target) -> numbers that train in its layer."""
    frozen: Callable[[Any], int] = lambda target: 0
    """(target) -> parameters of its adapter that do not train."""
    shared: Callable[[Any], int] = lambda config: 0
    """(config) -> numbers that train beside the layers, once a model."""


@dataclass(frozen=True)
class Selection:
    """The modules that a look at the data has chosen to be trained in full, alike on every rank and kept by a run."""

    chosen: list[str]
    """Names of the modules, the best first."""
    scores: dict[str, float]
    """The score of every candidate."""
    score: str
    """The name of the score."""

    def applied(self, config: AdapterConfig) -> AdapterConfig:
        """Return the config with the chosen modules trained in full in place of adapted."""
        return replace(
            config,
            exclude_modules=[*config.exclude_modules, *self.chosen],
            trainable_modules=[*config.trainable_modules, *self.chosen],
        )


@dataclass(frozen=True)
class Method:
    """Everything that the rest of the program knows about a method."""

    config: type[AdapterConfig]
    layers: dict[type[nn.Module], type[Adapter]] = field(default_factory=dict)
    """Kind of layer -> the adapter around it, made from (base_layer, target, config); empty where every weight
    trains."""
    trains_base: bool = False
    """True where every weight of the base trains beside the adapters, which a run then merges into a whole model."""
    trained: tuple[str, ...] = ()
    """Ends of the names of the parameters that train."""
    change: str = ""
    """The change to a weight W (d x k), as the table of methods prints it."""
    paper: str = ""
    """The publication of the method."""
    reconstruction: str = ""
    """The points that its paper leaves open and this package fills in, for docs and cards; empty without any."""
    count: str = ""
    """Numbers trained per linear layer (d x k), as the table of methods prints it."""
    shared: Callable[[Any, Any, Any], nn.Module] | None = None
    """(config, targets, model) -> state all layers share, handed to each as `shared`; it has `reset_parameters`, and
    may have a `regularization` like a layer's."""
    schedule: Callable[[Any, Any, int], StepSchedule] | None = None
    """(adapters by name, config, optimiser steps) -> the schedule that changes the adapters between steps."""
    select: Callable[[Any, Any, Any, Any], Selection] | None = None
    """(base model, config, losses of micro batches, device that sums over ranks) -> modules trained in full; before
    the adapters are made."""
    largest_selection: Callable[[Any, Any], Selection] | None = None
    """(base model, config) -> the selection that costs most, for an estimate without data."""
    cannot_shard: str = ""
    """The reason why slices of the adapters cannot be trained (strategy=fsdp); empty where they can."""
    peft: PeftSpelling | None = None
    """HF PEFT's words; without them the folder has our own words, for us to read."""
    contract: Contract = field(default_factory=Contract)

    @property
    def trains_all(self) -> bool:
        """Return whether every weight trains, so that a run leaves a whole model."""
        return self.trains_base or not self.layers

    @property
    def cannot_share_base(self) -> str:
        """Return why several adapters of this method cannot share a base in a bank; empty where they can."""
        if self.trains_all:
            return "trains the base itself"
        return "" if self.shared is None else "keeps state beside its layers, one a model"

    @property
    def merges(self) -> bool:
        """Return whether the change can be written into the base weight."""
        return all(adapter.mergeable for adapter in self.layers.values())


def only_written(spelling: PeftSpelling) -> PeftSpelling:
    """Return the spelling for a method whose folder is an adapter of the method that the spelling belongs to."""
    return replace(spelling, is_read=False)


def linears(adapter: type[Adapter]) -> dict[type[nn.Module], type[Adapter]]:
    """Map every kind of linear layer to one adapter class."""
    return {nn.Linear: adapter, QuantizedLinear: adapter, Conv1D: adapter}
