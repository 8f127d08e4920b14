"""A checkpoint in a published low-bit format as a source of weights: dense ones as tensors, the others as codes."""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import Concatenate, MergeModulelist

from lightning_peft.kernels.codes import Codes
from lightning_peft.models.conversion import Fusion
from lightning_peft.models.weight_files import WeightSource
from lightning_peft.quantization.experts import expert_stacks
from lightning_peft.quantization.published.format import LowBitWeight, PublishedFormat, matches_target
from lightning_peft.quantization.published.layers import dense_low_bit, prepare_low_bit, scale_a_row
from lightning_peft.quantization.published.mxfp4 import MXFP4
from lightning_peft.quantization.published.registry import published_format
from lightning_peft.quantization.weights import is_linear

logger = logging.getLogger(__name__)

ONLY_LOW_BIT = (".qweight", ".weight_packed", "_scale_inv", ".weight_scale", "_blocks")
"""Ends of names that no dense checkpoint has."""


def format_of(architecture: PreTrainedConfig) -> PublishedFormat | None:
    """Return the low-bit format that config.json says the weights are in; None for dense ones and bitsandbytes' codes.

    Raises ValueError for one that is not read.
    """
    options = getattr(architecture, "quantization_config", None)
    return published_format(options if isinstance(options, Mapping) or options is None else options.to_dict())


class Names:
    """A `WeightSource` of which only the names are at hand."""

    def __init__(self, names: list[str]):
        self._names = names

    def names(self) -> list[str]:
        return self._names

    def read(self, name: str, dtype: torch.dtype | None) -> Tensor:
        raise RuntimeError(f"{name} is not read: the names alone were asked for")


class LowBitSource:
    """The weights of a checkpoint in a published format, each under the name its dense form would have.

    Raises ValueError where the tensors are not what config.json says.
    """

    def __init__(self, source: WeightSource, form: PublishedFormat):
        self.source, self.form = source, form
        self.coded = form.weights(source.names())
        """Tensors that make each low-bit weight, by its part in the format."""
        if not self.coded:
            raise ValueError(f"config.json says that the weights are {form.describe()}, and no tensor of the files is")
        parts = {key for keys in self.coded.values() for key in keys.values()}
        dense = [key for key in source.names() if key not in parts]
        self.dense = [key for key in dense if not key.endswith(form.unused)] if form.unused else dense
        if len(self.dense) < len(dense):
            logger.info("activations are not quantised: %d of their scales are not read", len(dense) - len(self.dense))

    def names(self) -> list[str]:
        return [*self.dense, *self.coded]

    def read(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """Return the tensor, dequantised where it is low-bit."""
        if name not in self.coded:
            return self.source.read(name, dtype)
        return dense_low_bit(self.read_codes(name), dtype or torch.bfloat16)

    def read_codes(self, name: str) -> LowBitWeight:
        return self.form.read(name, {part: self.source.read(key, None) for part, key in self.coded[name].items()})

    def read_fused(self, model: PreTrainedModel, fusion: Fusion) -> LowBitWeight:
        """Return the codes of a parameter that is made of several weights, put together as these would be dense."""
        weights = {key: self.read_codes(key) for key, _ in fusion.members}
        first = next(iter(weights.values()))
        if len({(weight.kind, weight.block_size) for weight in weights.values()}) > 1:
            raise ValueError(f"{fusion.name} is made of weights in different bits or groups; give the original model")
        if any(weight.codes.absmax_offset is not None for weight in weights.values()):
            raise ValueError(
                f"{fusion.name} is made of weights whose columns are grouped by activation order (desc_act), each in "
                "its own way; give a checkpoint without it"
            )
        puts_below = any(isinstance(operation, Concatenate) for operation in fusion.rule.operations)
        if puts_below and any(weight.codes.weight.shape[0] % weight.block_size for weight in weights.values()):
            weights = {key: scale_a_row(weight) for key, weight in weights.items()}
        parts: list[Tensor | None] = []
        for field in range(len(first.codes)):
            if first.codes[field] is None:
                parts.append(None)
                continue

            def one(key: str, field: int = field) -> Tensor:
                tensor = weights[key].codes[field]
                assert tensor is not None
                return tensor

            ((_, tensor),) = fusion.run(model, one)
            parts.append(tensor.contiguous())
        return first._replace(codes=Codes(*parts))  # type: ignore[arg-type]


def check_named(source: WeightSource) -> None:
    """Raise ValueError for low-bit weights that config.json does not speak of."""
    if found := [key for key in source.names() if key.endswith(ONLY_LOW_BIT)]:
        raise ValueError(
            f"{found[0]} belongs to a low-bit weight, and config.json has no quantization_config that says which; give "
            "the config.json that the weights were published with"
        )


def prepare_low_bit_layers(
    model: PreTrainedModel, source: LowBitSource, direct: Mapping[str, str], fused: Mapping[str, Fusion]
) -> list[str]:
    """Make those layers of an empty model coded ones that the checkpoint holds so; return their parameters' names.

    Raises ValueError for low-bit weights that transformers puts together in a way that codes cannot be.
    """
    names = {name: _layer(key) for name, key in direct.items() if key in source.coded}
    for name, fusion in fused.items():
        coded = [key for key, _ in fusion.members if key in source.coded]
        if not coded:
            continue
        if len(coded) < len(fusion.members) or not _keeps_columns(fusion):
            raise ValueError(
                f"{name} is made of {source.form.describe()} weights in a way that codes cannot be; "
                "give the original model"
            )
        names[name] = _layer(coded[0])
    found = prepare_low_bit(model, names, source.form)
    logger.info("%d layers are %s and stay as they are published", len(found), source.form.describe())
    if dense := sorted(names.keys() - set(found)):
        logger.info("%d layers are made dense, as the model reads their weights itself: %s", len(dense), dense[0])
    return found


def prepare_by_config(model: PreTrainedModel, form: PublishedFormat) -> list[str]:
    """Make those layers of an empty model coded ones that config.json says are; return their parameters' names.

    All linear layers and experts are, but for the output head and those that it names.
    """
    head = model.get_output_embeddings()
    experts_only = isinstance(form, MXFP4)
    linears = [n for n, m in model.named_modules() if is_linear(m) and m is not head and not experts_only]
    names = {f"{name}.weight": name for name in linears}
    names |= {name: name for name, stack in expert_stacks(model).items() if stack.opens}
    return prepare_low_bit(model, {name: layer for name, layer in names.items() if not _is_skipped(layer, form)}, form)


def _is_skipped(layer: str, form: PublishedFormat) -> bool:
    return any(matches_target(given, layer) or f".{given}." in f".{layer}." for given in form.skipped())


def _layer(key: str) -> str:
    return key.removesuffix(".weight")


def _keeps_columns(fusion: Fusion) -> bool:
    """Return whether a rule only stacks matrices and puts rows under rows, so that codes and scales go the same way."""
    stacks = any(isinstance(operation, MergeModulelist) for operation in fusion.rule.operations)
    return len(fusion.rule.target_patterns) == 1 and all(
        isinstance(op, MergeModulelist) or (isinstance(op, Concatenate) and op.dim == int(stacks))
        for op in fusion.rule.operations
    )
