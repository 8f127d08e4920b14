"""The strongest directions of an adapter read as keys and values: the tokens that each looks for, and those that it
promotes.

The change of a layer is a sum of s_i u_i v_i^T, its singular value decomposition: at a token with input x it adds
s_i (v_i . x) u_i. v_i is the key, and the tokens where v_i . x is largest are what it looks for; u_i is the value, and
where the layer writes the residual stream, the output head says which tokens it makes likelier (Geva et al. 2021,
arXiv:2012.14913; Dar et al. 2022, arXiv:2209.02535).
"""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.layer_names import FEED_FORWARD_OUT, block_depth, matches
from lightning_peft.models.blocks import decoder_of
from lightning_peft.quantization.weights import weight_shape

WRITERS = ["o_proj", "out_proj", "c_proj", "dense", "wo", "dense_4h_to_h", "out_linear", *FEED_FORWARD_OUT]
"""Names of the layers whose output is added to the residual stream."""
NORMED = (
    "post_feedforward_layernorm",
    "post_mlp_layernorm",
    "post_self_attn_layernorm",
    "post_feedforward_layernorm_1",
)
"""Norms of blocks that normalise what attention and feed-forward give before it is added."""
PROMOTING = ("residual stream", "logits")
"""The destinations of layers whose directions promote tokens."""
CONTEXT = 8
"""Tokens shown before the one that is read."""
READ, PROMOTED = 5, 8
"""Tokens shown of each direction. Ours."""


@dataclass(frozen=True)
class Reading:
    """A token of the data at which a direction's key is met."""

    token: str
    context: str
    """The text up to it."""
    activation: float
    """v . x, as a multiple of its root mean square over all tokens of the data."""


@dataclass(frozen=True)
class Direction:
    """One direction of one layer's change."""

    layer: str
    index: int
    """0 for the layer's strongest."""
    singular_value: float
    energy: float
    """The direction's share of the layer's squared change."""
    reads: list[Reading]
    """Places where v . x is largest, each token once; the sign of v is that of the largest in size."""
    promotes: list[str] | None
    """Tokens whose logits the value raises most, at the tokens that are read; None where the layer writes elsewhere."""
    writes: str
    """The destination of the layer's output: `residual stream`, `logits`, or another in words."""


@dataclass
class SingularDirection:
    """A direction that is being read."""

    layer: str
    index: int
    value: float
    energy: float
    key: Tensor
    """(in,) fp32, of norm one."""
    output: Tensor
    """(out,) fp32, of norm one."""


def strongest(found: Mapping[str, Adapter], count: int) -> list[SingularDirection]:
    """Return the directions of the largest singular values over the layers, embeddings aside, which read no vector."""
    parts: list[SingularDirection] = []
    for name, layer in found.items():
        if isinstance(layer.base_layer, nn.Embedding):
            continue  # its input is the token itself
        values, keys, outputs = decomposed(layer, count)
        total = float(values.square().sum())
        for index, value in enumerate(values[:count].tolist()):
            if value > 0:
                parts.append(SingularDirection(name, index, value, value**2 / total, keys[index], outputs[index]))
    return sorted(parts, key=lambda part: -part.value)[:count]


def decomposed(layer: Adapter, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return all singular values of a layer's change, and the first keys (n, in) and outputs (n, out)."""
    factors = layer.low_rank()
    if factors is None:
        change = layer.delta_weight().detach().float()
        U, values, Vh = torch.linalg.svd(change, full_matrices=False)
        return values, Vh[:count], U.mT[:count]
    basis_B, triangle_B = torch.linalg.qr(factors.B.float())
    basis_A, triangle_A = torch.linalg.qr(factors.A.float().mT)
    U, values, Vh = torch.linalg.svd(triangle_B @ triangle_A.mT * factors.scaling)
    return values, (basis_A @ Vh.mT).mT[:count], (basis_B @ U).mT[:count]


@torch.inference_mode()
def key_values(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    found: Mapping[str, Adapter],
    rows: Iterable[Sequence[int]],
    count: int,
) -> list[Direction]:
    """Return the `count` strongest directions of layers that promote tokens, and as many of the other layers.

    The directions are read on rows of token ids that the model runs through one by one.
    """
    writers: dict[str, Adapter] = {}
    others: dict[str, Adapter] = {}
    for name, layer in found.items():
        promotes = written_by(model, name, weight_shape(layer.base_layer)[0]) in PROMOTING
        (writers if promotes else others)[name] = layer
    parts = [*strongest(writers, count), *strongest(others, count)]
    norm = final_norm(model)
    tokens: list[tuple[int, int]] = []
    """Row and place of every token read."""
    kept: list[list[int]] = []
    met: list[list[Tensor]] = [[] for _ in parts]
    hidden: list[Tensor] = []
    hooks = []
    for place, part in enumerate(parts):
        hooks.append(found[part.layer].register_forward_pre_hook(partial(_read, met[place], part.key)))
    if norm is not None:
        hooks.append(norm.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0][0].float().cpu())))
    try:
        for number, ids in enumerate(rows):
            kept.append(list(ids))
            tokens += [(number, place) for place in range(len(ids))]
            model(input_ids=torch.tensor([kept[-1]], device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if not tokens:
        raise ValueError("the run's data has no validation rows to read")
    before_norm = torch.cat(hidden) if hidden else None
    return [
        _direction(part, torch.cat(met[place]), tokens, kept, before_norm, norm, model, tokenizer)
        for place, part in enumerate(parts)
    ]


def _read(met: list[Tensor], key: Tensor, _: nn.Module, inputs: tuple[Any, ...]) -> None:
    x = inputs[0]
    met.append((x.reshape(-1, x.shape[-1]).float() @ key.to(x.device)).cpu())


def _direction(
    part: SingularDirection,
    met: Tensor,
    tokens: list[tuple[int, int]],
    rows: list[list[int]],
    before_norm: Tensor | None,
    norm: nn.Module | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
) -> Direction:
    sign = 1.0 if met[met.abs().argmax()] >= 0 else -1.0
    met = sign * met
    size = float(met.square().mean().sqrt()) or 1.0
    chosen: dict[int, int] = {}
    for place in met.argsort(descending=True).tolist():
        row, at = tokens[place]
        chosen.setdefault(rows[row][at], place)
        if len(chosen) == READ:
            break
    reads = []
    for token, place in chosen.items():
        row, at = tokens[place]
        context = str(tokenizer.decode(rows[row][max(0, at - CONTEXT) : at + 1]))
        reads.append(Reading(str(tokenizer.decode([token])), context, float(met[place]) / size))
    writes = written_by(model, part.layer, len(part.output))
    promotes = None
    if writes in PROMOTING:
        change = sign * part.output.cpu()
        if writes == "residual stream":
            assert norm is not None and before_norm is not None, "a model with a residual stream ends in a norm"
            change = through_head(model, norm, before_norm[list(chosen.values())], change)
        best = change[: len(tokenizer)].topk(min(PROMOTED, len(change))).indices.tolist()
        promotes = [str(tokenizer.decode([token])) for token in best]
    return Direction(part.layer, part.index, part.value, part.energy, reads, promotes, writes)


def written_by(model: PreTrainedModel, name: str, width: int) -> str:
    """Return in words what a layer's output is added to, or goes into."""
    layer: Any = model.get_submodule(name)
    if model.get_output_embeddings() is layer:
        return "logits"
    if final_norm(model) is None:
        return "where no final norm was found to read it by"
    if width != model.config.get_text_config().hidden_size:
        return "inside its block"
    if block_depth(name) is None or not any(matches(writer, name) for writer in WRITERS):
        return "inside its block"
    block = model.get_submodule(name[: name.index(f".{block_depth(name)}.") + len(f".{block_depth(name)}")])
    if any(child in NORMED for child, _ in block.named_children()):
        return "a norm before the residual stream"
    return "residual stream"


def final_norm(model: PreTrainedModel) -> nn.Module | None:
    """Return the norm between the decoder's blocks and the head; None for a decoder that names none."""
    decoder = decoder_of(model)
    width = model.config.get_text_config().hidden_size
    norms = [
        child
        for _, child in decoder.named_children()
        if "norm" in type(child).__name__.lower() and any(p.shape == (width,) for p in child.parameters())
    ]
    return norms[-1] if norms and decoder is not model else None


def through_head(model: PreTrainedModel, norm: nn.Module, hidden: Tensor, change: Tensor) -> Tensor:
    """Return the first-order change of the logits, (V,), that `change` (D,) of the hidden states makes: their mean.

    hidden (N, D), fp32, is what the final norm is fed. The effect of the change through later layers is left out.
    """
    head: Any = model.get_output_embeddings()
    head = head.base_layer if isinstance(head, Adapter) else head
    exact = deepcopy(norm).float().cpu()
    step = 1e-2 * hidden.square().mean().sqrt()
    difference = (exact(hidden + step * change) - exact(hidden - step * change)).mean(0) / (2 * step)
    return head.weight.detach().float().cpu() @ difference
