"""Causal attention over packed samples by matrix products of torch over strips of queries.

A strip (see `grouping`) is worth a few large products, which oneDNN runs near a core's peak, where torch's
flash attention for CPUs multiplies small tiles at a quarter of it. Nothing of size T x T is ever held.

A CPU without bf16 instructions emulates them, 4 to 9 times slower than fp32 (measured, AVX2), so there rows are
computed in fp32.
"""

import math
from functools import cache

import torch
from torch import Tensor

from lightning_peft.kernels.attention.grouping import (
    Arrangement,
    LengthGroup,
    SampleBounds,
    Strip,
    arrange,
    most_samples,
    strip_length,
)
from lightning_peft.kernels.native.library import Scratch

PADDING_NORMALIZER = 1e30
"""Log normaliser of a query in the padding: its probabilities are zero."""


def in_slots(x: Tensor, arrangement: Arrangement) -> Tensor:
    """Reorder (N, ...) from the batch's order to (slots, ...)."""
    return x if arrangement.reordering is None else x.index_select(0, arrangement.reordering.tokens)


def in_order(x: Tensor, arrangement: Arrangement) -> Tensor:
    """Reorder (slots, ...) to (N, ...) in the batch's order."""
    return x if arrangement.reordering is None else x.index_select(0, arrangement.reordering.places)


def by_head(x: Tensor, group: LengthGroup, key_heads: int) -> Tensor:
    """Return the group's part of (slots, H, C), a view (samples, key heads, length, H / key heads, C)."""
    return x[group.slots].view(group.samples, group.length, key_heads, -1, x.shape[-1]).transpose(1, 2)


def to_rows(x: Tensor, group: LengthGroup, key_heads: int, dtype: torch.dtype) -> Tensor:
    """Reorder (slots, H, C) to (batch, rows, C), contiguous: a strip's rows follow one another.

    `batch` is samples * key heads, `rows` length * H / key heads.
    """
    heads = by_head(x, group, key_heads)
    return torch.empty(heads.shape, dtype=dtype).copy_(heads).flatten(2, 3).flatten(0, 1)


def to_columns(x: Tensor, group: LengthGroup, dtype: torch.dtype, ones: int = 0) -> Tensor:
    """Reorder (slots, G, D) to (batch, D + ones, length), contiguous, with ones in the last rows."""
    heads = by_head(x, group, x.shape[1]).squeeze(3).mT
    columns = torch.empty(*heads.shape[:2], x.shape[-1] + ones, group.length, dtype=dtype)
    columns[:, :, : x.shape[-1]].copy_(heads)
    columns[:, :, x.shape[-1] :].fill_(1)
    return columns.flatten(0, 1)


def queries_of(strip: Strip, rows: Tensor, group: LengthGroup) -> Tensor:
    """Return the strip's part of what `to_rows` gave."""
    ratio = rows.shape[1] // group.length
    return rows[:, strip.start * ratio : strip.stop * ratio]


def put(x: Tensor, whole: Tensor, group: LengthGroup, key_heads: int, queries: slice, factor: float = 1.0) -> None:
    """Write x (batch, rows, C), the rows of these queries of every sample, times `factor`, to `whole` (slots, H, C)."""
    place = by_head(whole, group, key_heads)[:, :, queries]
    if factor == 1:
        place.copy_(x.view(place.shape))
    else:
        torch.mul(x.view(place.shape), factor, out=place)


class Product:
    """Products of a group's strips, written to the same memory in turn, which so stays in the cache."""

    def __init__(self, queries: Tensor, group: LengthGroup, dtype: torch.dtype):
        """Take `queries` as `to_rows` gives them, the left factors' rows."""
        most = max((strip.stop - strip.start) * (strip.stop - strip.first) for strip in group.strips)
        self.memory = torch.empty(queries.shape[0] * queries.shape[1] // group.length * most, dtype=dtype)

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        shape = (left.shape[0], left.shape[1], right.shape[2])
        return torch.bmm(left, right, out=self.memory[: math.prod(shape)].view(shape))


def scratch(query: Tensor, key: Tensor, backward: bool) -> Scratch:
    """Return what a call holds for a moment, beside its result, where each row is one sample."""
    rows, heads, width, head_dim = query.shape
    dtype = query.dtype if _native(query.dtype) else torch.float32
    copies = [(tuple(x.shape), dtype) for x in (query, key, key)] if dtype != query.dtype else []
    # Groups follow one another, so what one of them holds counts once.
    samples = min(rows, most_samples(width, heads, window=None))
    scores = (samples * heads, strip_length(samples * heads, width), width)
    queries, keys = (samples, heads, width, head_dim), (samples, key.shape[1], width, head_dim)
    if backward:
        widened = (*query.shape[:3], head_dim + 2), (*queries[:3], head_dim + 2)
        return [
            *copies, *[(shape, dtype) for shape in (scores, scores, *widened, *widened, keys, keys, keys)],
            *[(keys, torch.float32)] * 2,
        ]  # fmt: skip
    rounded = [(scores, dtype)] if dtype != torch.float32 else []
    return [*copies, (scores, torch.float32), *rounded, (queries, torch.float32), (keys, torch.float32), (keys, dtype)]


def hide(scores: Tensor, strip: Strip) -> None:
    """Mask scores (batch, queries * H / G, keys) in place."""
    queries, masked = strip.mask.shape
    scores.unflatten(1, (queries, -1))[..., scores.shape[-1] - masked :].add_(strip.mask[:, None].to(scores.dtype))


def attend_group(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, group: LengthGroup, output: Tensor, normalizers: Tensor
) -> None:
    """Compute the softmax attention of one group's slots out of query (slots, H, D), key and value (slots, G, D).

    The result goes to `output` (slots, H, D) and, fp32, `normalizers` (slots, H, 1). Scores and softmax are fp32,
    probabilities are rounded to the dtype of `value`.
    """
    key_heads = key.shape[1]
    queries = to_rows(query, group, key_heads, torch.float32)
    keys = to_columns(key, group, torch.float32).mul_(scaling)
    values = to_rows(value, group, key_heads, value.dtype)
    product = Product(queries, group, torch.float32)
    largest, likeliest = (queries.new_empty(*queries.shape[:2], 1) for _ in range(2))
    for strip in group.strips:
        seen = slice(strip.first, strip.stop)
        scores = product(queries_of(strip, queries, group), keys[:, :, seen])
        hide(scores, strip)
        torch.amax(scores, -1, keepdim=True, out=queries_of(strip, largest, group))
        probabilities = torch.softmax(scores, -1, out=scores)
        torch.amax(probabilities, -1, keepdim=True, out=queries_of(strip, likeliest, group))
        attended = torch.bmm(probabilities.to(value.dtype), values[:, seen])
        put(attended, output, group, key_heads, slice(strip.start, strip.stop))
    put(largest.sub_(likeliest.log_()), normalizers, group, key_heads, slice(None))


def with_constant(x: Tensor, constant: Tensor) -> Tensor:
    """Join (..., D) and (..., 1) fp32 to (..., D + 2): the constant is in two columns, to twice x's digits.

    A product with a matrix that has ones in its last rows adds the constant.
    """
    high = constant.to(x.dtype)
    return torch.cat((x, high, (constant - high).to(x.dtype)), -1)


def attend_group_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    after: float,
    group: LengthGroup,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
) -> None:
    """Write `grad_query` (slots, H, D), `grad_key` and `grad_value` (slots, G, D).

    P = exp(s - normalizer) and dS = P * (dO V^T - <dO, O>) (Dao et al. 2022, arXiv:2205.14135, section 3.1). Both
    differences are taken inside the products, in their fp32 sums: what is rounded to bf16 is small where P is not. So
    `query` (slots, H, D + 2) has its normaliser beside it and `grad` <dO, O>. Scores are multiplied by `after`: 1 where
    `query` was multiplied by `scaling` before, else `scaling`.
    """
    key_heads, head_dim = key.shape[1:]
    dtype = key.dtype
    queries, grads, keys = (to_rows(x, group, key_heads, dtype) for x in (query, grad, key))
    keys_and_ones, values_and_ones = (to_columns(x, group, dtype, ones=2) for x in (key, value))
    probability_product, gradient_product = (Product(queries, group, dtype) for _ in range(2))
    sums_shape = keys.shape[0], head_dim, group.length
    key_sums, value_sums = (torch.zeros(sums_shape, dtype=torch.float32) for _ in range(2))
    for strip in group.strips:
        seen = slice(strip.first, strip.stop)
        # Each of two products would copy what is not contiguous.
        q, g = (queries_of(strip, x, group).contiguous() for x in (queries, grads))
        probabilities = probability_product(q, keys_and_ones[:, :, seen])
        if after != 1:
            probabilities.mul_(after)
        hide(probabilities, strip)
        probabilities.exp_()
        # Products with the small factor transposed are faster than those with the large one.
        value_sums[:, :, seen] += torch.bmm(g.mT, probabilities)[:, :head_dim]
        grad_scores = gradient_product(g, values_and_ones[:, :, seen]).mul_(probabilities)
        key_sums[:, :, seen] += torch.bmm(q.mT, grad_scores)[:, :head_dim]
        grad_queries = torch.bmm(grad_scores, keys[:, seen])
        put(grad_queries, grad_query, group, key_heads, slice(strip.start, strip.stop), scaling)
    put(key_sums.mul_(after).mT, grad_key, group, key_heads, slice(None))
    put(value_sums.mT, grad_value, group, key_heads, slice(None))


def attend(
    query: Tensor, key: Tensor, value: Tensor, samples: list[SampleBounds], scaling: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Return the output (B, T, H, D) and log normalisers (B, T, H) fp32.

    query (B, H, T, D), key and value (B, G, T, D).
    """
    rows, heads, width, head_dim = query.shape
    arrangement = arrange(tuple(samples), heads, window)
    output = query.new_empty(arrangement.num_slots, heads, head_dim)
    normalizers = query.new_empty(arrangement.num_slots, heads, 1, dtype=torch.float32)
    q, k, v = (in_slots(computed(flat(x)), arrangement) for x in (query, key, value))
    for group in arrangement.groups:
        attend_group(q, k, v, scaling, group, output, normalizers)
    return (
        in_order(output, arrangement).view(rows, width, heads, head_dim),
        in_order(normalizers, arrangement).view(rows, width, heads),
    )


def attend_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    normalizers: Tensor,
    samples: list[SampleBounds],
    scaling: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value from the output's (B, T, H, D) and from what `attend` gave."""
    rows, heads, width, _ = query.shape
    arrangement = arrange(tuple(samples), heads, window)
    q, k, v = (computed(flat(x)) for x in (query, key, value))
    g, out = (computed(x.reshape(-1, *x.shape[2:])) for x in (grad_output, output))
    # A power of two changes no digit of the query; any other factor comes after the product.
    before, after = (scaling, 1.0) if math.frexp(scaling)[0] == 0.5 else (1.0, scaling)
    q = with_constant(q * before, normalizers.view(-1, heads, 1) / -after)
    g = with_constant(g, g.to(torch.float32, copy=True).mul_(out).sum(-1, keepdim=True).neg_())
    q, g, k, v = (in_slots(x, arrangement) for x in (q, g, k, v))
    if arrangement.reordering is not None:
        q[..., -2].masked_fill_(arrangement.reordering.is_padding[:, None], -PADDING_NORMALIZER)
    gradients = [x.new_empty(arrangement.num_slots, x.shape[1], x.shape[3]) for x in (query, key, value)]
    for group in arrangement.groups:
        attend_group_backward(g, q, k, v, scaling, after, group, *gradients)
    grad_query, grad_key, grad_value = (
        in_order(x, arrangement).view(rows, width, *x.shape[1:]).transpose(1, 2) for x in gradients
    )
    return grad_query, grad_key, grad_value


def flat(x: Tensor) -> Tensor:
    """Return (B, H, T, D) as (B T, H, D), a view of what projections give."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def computed(x: Tensor) -> Tensor:
    """Return x in the dtype this processor computes it in."""
    return x if _native(x.dtype) else x.float()


@cache
def _native(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
