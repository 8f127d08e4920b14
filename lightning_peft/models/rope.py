"""Longer than a model's context: rotary positions scaled before the model is built."""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.models.blocks import decoder_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel  # a start that trains nothing does without it

logger = logging.getLogger(__name__)

SCALINGS = ("linear", "dynamic", "yarn")
"""Ways to scale, by transformers' names: all positions divided by the factor (Chen et al. 2023, arXiv:2306.15595), a
base that grows with the longest sample of a batch, and YaRN (Peng et al. 2023, arXiv:2309.00071)."""
OF_A_SCALING = {
    "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "short_factor", "long_factor",
    "low_freq_factor", "high_freq_factor",
}  # fmt: skip
"""Rotary parameters that belong to one way of scaling; all others say how the model is computed whatever it is."""
ALWAYS_NEW = ("rope_type", "type", "factor", "original_max_position_embeddings")

TABLE_OF_POSITIONS = re.compile(r"wpe|(embed_)?positions?(_embed\w*)?|pos_encoding")
"""Names of parts that hold a row for each position."""
ROWS_BESIDE = 8
"""Most rows that such a table has beside those of the context: OPT's has two that no token takes."""
BIASES_BY_TABLE = ("mpt",)
"""Types that add a bias for each distance and compute those up to their context alone."""


@dataclass
class RopeScaling:
    """The reach of rotary positions beyond the context the model was trained on."""

    type: str | None = None
    """linear, dynamic or yarn; null keeps the model's own positions. yarn needs the least training; dynamic changes
    nothing within the model's context, and is never packed, as the longest sample of a batch decides for all."""
    factor: float | None = None
    """Context wanted over the context trained on, above 1."""
    original_max_position_embeddings: int | None = None
    """Tokens the model was trained on; null takes its `max_position_embeddings`."""

    def __post_init__(self) -> None:
        if self.type is None:
            if self.factor is not None or self.original_max_position_embeddings is not None:
                raise ValueError(
                    f"model.rope_scaling.type=null: give one of {', '.join(SCALINGS)}, or none of its keys"
                )
            return
        if self.type not in SCALINGS:
            raise ValueError(f"model.rope_scaling.type={self.type}: must be one of {', '.join(SCALINGS)}")
        if self.factor is None or not self.factor > 1:
            raise ValueError(f"model.rope_scaling.factor={self.factor}: must be above 1")
        original = self.original_max_position_embeddings
        if original is not None and original < 1:
            raise ValueError(f"model.rope_scaling.original_max_position_embeddings={original}: must be at least 1")

    @property
    def is_on(self) -> bool:
        return self.type is not None

    def __str__(self) -> str:
        return f"model.rope_scaling.type={self.type} model.rope_scaling.factor={self.factor}"


def scale_positions(architecture: "PreTrainedConfig", scaling: RopeScaling) -> None:
    """Set a model's configuration to positions scaled so, and to the context that gives.

    Raises ValueError where it has no rotary positions, or has scaled ones and nobody says what it was trained on.
    """
    if not scaling.is_on:
        return
    text: Any = architecture.get_text_config()
    parameters = getattr(text, "rope_parameters", None)
    if not parameters:
        raise ValueError(f"model.rope_scaling.type={scaling.type}: {text.model_type} has no rotary positions to scale")
    nested = text.nested_rope_parameter_keys(parameters)
    # Layers with a sliding window never see farther than it.
    scaled = [parameters[key] for key in nested if "sliding" not in key and parameters[key]] if nested else [parameters]
    own = {part.get("rope_type", "default") for part in scaled} - {"default"}
    original = scaling.original_max_position_embeddings
    if own and original is None:
        raise ValueError(
            f"model.rope_scaling.type={scaling.type}: the model's positions are scaled by {', '.join(sorted(own))} "
            "already; give model.rope_scaling.original_max_position_embeddings, the context they start from"
        )
    if own:
        logger.info("%s in place of the model's own scaling, %s", scaling, ", ".join(sorted(own)))
    original = original or text.max_position_embeddings
    for part in scaled:
        dropped = {*ALWAYS_NEW}
        if part.get("rope_type") != scaling.type:
            dropped |= OF_A_SCALING
        elif part.get("factor") != scaling.factor:
            dropped.add("attention_factor")  # it was that of the old factor
        kept = {key: value for key, value in part.items() if key not in dropped}
        part.clear()
        part.update(kept, rope_type=scaling.type, factor=scaling.factor)
        if scaling.type == "yarn":
            part["original_max_position_embeddings"] = original
    if hasattr(text, "original_max_position_embeddings"):
        text.original_max_position_embeddings = original
    # The dynamic base is computed from the context trained on, which transformers reads there.
    assert scaling.factor is not None
    text.max_position_embeddings = original if scaling.type == "dynamic" else int(original * scaling.factor)
    try:  # it is read as a saved config.json would be read again: a family may know some ways alone, as Phi 3 does
        read = type(text).from_dict(text.to_dict()).rope_parameters
    except (KeyError, ValueError):
        read = None
    if read != text.rope_parameters:
        raise ValueError(
            f"model.rope_scaling.type={scaling.type}: transformers knows no such type for {text.model_type}"
        )


def check_scaled(model: nn.Module, scaling: RopeScaling) -> None:
    """Raise ValueError for a built model whose code has not taken the scaling of its configuration."""
    kinds: set[str] = set()
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        kinds |= set(kind.values()) if isinstance(kind, dict) else {kind} if kind else set()
    if scaling.is_on and scaling.type not in kinds:
        raise ValueError(
            f"model.rope_scaling.type={scaling.type}: transformers does not scale the positions of "
            f"{type(model).__name__}"
        )


def check_frequencies(model: nn.Module) -> None:
    """Raise ValueError for a built model whose configuration gives its rotary positions frequencies that are none.

    longrope's second set is read when the first long sample comes.
    """
    architecture: Any = model.config
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and not buffer.isfinite().all():
            raise ValueError(
                f"config.json: rope_parameters={_shown(architecture)} gives frequencies that are not finite"
            )
    for part in _parts(architecture.get_text_config()):
        factors: list[Any] = [part.get("short_factor"), part.get("long_factor")]
        are_lists = all(_are_numbers(values) for values in factors)
        if part.get("rope_type") == "longrope" and not (are_lists and len(factors[0]) == len(factors[1])):
            raise ValueError(
                f"config.json: rope_parameters={_shown(architecture)}: short_factor and long_factor must be lists of "
                "numbers, as many in each"
            )


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) in (int, float) for value in values)


def _shown(architecture: Any) -> str:
    return str(architecture.get_text_config().rope_parameters)[:200]


def context_length(architecture: "PreTrainedConfig") -> int | None:
    """Return the longest sequence a model was made for, in tokens; None when its configuration does not say."""
    text = architecture.get_text_config()
    length: int | None = getattr(text, "max_position_embeddings", getattr(text, "max_seq_len", None))
    if length is not None and _has(architecture, "dynamic"):
        return int(length * max(part.get("factor", 1) for part in _parts(text)))
    return length


def table_of_positions(model: "PreTrainedModel") -> int | None:
    """Return for how many positions a model has a table, trained or computed once, which no text may go beyond.

    None where positions are computed as they come, as rotary ones are, or where there are none.
    """
    architecture: Any = model.config
    if (context := context_length(architecture)) is None:
        return None
    text = decoder_of(model)
    tables: dict[str, Any] = {name: part for name, part in text.named_modules() if isinstance(part, nn.Embedding)}
    tables |= {name: part for name, part in vars(text).items() if isinstance(part, Tensor)}  # CTRL's is no buffer
    tables |= dict(text.named_buffers())
    found = [
        part
        for name, part in tables.items()
        if TABLE_OF_POSITIONS.fullmatch(name.rpartition(".")[2])
        and context <= len(getattr(part, "weight", part)) <= context + ROWS_BESIDE  # it is not one of a tower of vision
    ]
    if not found and architecture.model_type not in BIASES_BY_TABLE:
        return None
    # RoBERTa's positions begin behind that of its padding, in a table of as many rows as its context.
    begin = next((p.padding_idx + 1 for p in found if getattr(p, "padding_idx", None) is not None), 0)
    rows = min((len(getattr(part, "weight", part)) for part in found), default=context)
    return min(context, rows - begin)


def follows_length(architecture: "PreTrainedConfig", longest: int | None) -> bool:
    """Return whether the rotary frequencies are those of a batch's longest sample, so that samples change one another.

    longrope has two sets, the second for batches with a sample beyond the context trained on; `longest` are the tokens
    that a sample may have.
    """
    text = architecture.get_text_config()
    original = getattr(text, "original_max_position_embeddings", None)
    originals = [part.get("original_max_position_embeddings", original) for part in _parts(text)]
    is_beyond = longest is None or any(start is not None and longest > start for start in originals)
    has_two_sets = any(
        part.get("rope_type") == "longrope" and part.get("short_factor") != part.get("long_factor")
        for part in _parts(text)
    )
    return _has(architecture, "dynamic") or (has_two_sets and is_beyond)


def _has(architecture: "PreTrainedConfig", kind: str) -> bool:
    return any(part.get("rope_type") == kind for part in _parts(architecture.get_text_config()))


def _parts(text: Any) -> list[dict[str, Any]]:
    parameters = getattr(text, "rope_parameters", None) or {}
    return [parameters, *(part for part in parameters.values() if isinstance(part, dict))]


def set_positions_by_row(model: nn.Module) -> None:
    """Let the length of each row alone set its rotary frequencies, where transformers goes by the longest of a batch.

    Under a dynamic base it goes by the batches before as well, which a resumed run has not seen.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if {"dynamic", "longrope"} & set(kinds.values() if isinstance(kinds, dict) else [kinds]):
            module.forward = partial(_row_by_row, module, module.forward)


def _row_by_row(
    module: nn.Module, forward: Callable[..., Any], x: Tensor, position_ids: Tensor, *args: Any, **options: Any
) -> Any:
    """Return what `forward` makes of the positions (B, T) of each row alone."""

    def of(rows: slice) -> Any:
        _forget_length(module)
        return forward(x[rows] if len(x) == len(position_ids) else x, position_ids[rows], *args, **options)

    if position_ids.ndim != 2 or len(position_ids) == 1 or len(set(position_ids.amax(1).tolist())) == 1:
        return of(slice(None))
    parts = [of(slice(row, row + 1)) for row in range(len(position_ids))]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def _forget_length(module: nn.Module) -> None:
    """Give a dynamic base back what it was before its first batch."""
    for name, buffer in list(module.named_buffers(recurse=False)):
        original = getattr(module, f"{name.removesuffix('inv_freq')}original_inv_freq", None)
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq") and original is not None:
            module._buffers[name] = original.to(buffer.device, copy=True)
    for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
        setattr(module, name, module.original_max_seq_len)
