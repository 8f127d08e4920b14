"""Causal attention over packed samples on a CPU, by matrix products over strips of queries.

A strip is a run of queries of all heads; its keys go from where its first sample begins (or its window) to its last
query. A strip is worth a few large products, which oneDNN runs near a core's peak, where torch's flash attention
for CPUs multiplies small tiles at a quarter of it (benchmarks/attention.py). Nothing of size T x T is ever held.

Operators of their own, so that the compiler keeps a block in one graph. What they keep for the backward pass has the
dtype it came in. A CPU without bf16 instructions emulates them, 4 to 9 times slower than fp32 (measured, AVX2), so
there rows are computed in fp32.
"""

import math
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_STRIP, MIN_STRIP = 128, 32
"""Queries of a strip. Ours: shorter ones multiply slower, longer ones compute more of what the mask then hides."""
STRIP_COST = 2**17
"""Scores that cost as much as the start of a strip's thirty operators (fitted to times on two AVX-512 cores)."""
STRIP_BYTES = 2**25
"""fp32 scores of a strip longer than the shortest. Ours: with fewer the products of long samples are too small."""

Segment = tuple[int, int, int]
"""Row of the batch, first position, position past the last."""


class Strip(NamedTuple):
    """Queries `start` to `stop`, whose keys go from `first` to `stop`."""

    start: int
    stop: int
    first: int
    mask: Tensor
    """Additive, fp32, (queries, masked keys): for the last keys of the strip, all those before are seen."""


def find_segments(cu_seqlens: Tensor, rows: int, width: int) -> list[Segment]:
    """The samples of a (rows, width) batch."""
    bounds = cu_seqlens.tolist()
    segments = [(a // width, a % width, a % width + b - a) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    if bounds[0] != 0 or bounds[-1] != rows * width or any(not a < b <= width for _, a, b in segments):
        raise ValueError(f"cu_seqlens={bounds}: must rise from 0 to {rows * width}, no sample over two rows of {width}")
    return segments


def strip_length(heads: int, keys: int) -> int:
    """Queries whose scores of all heads on so many keys stay within STRIP_BYTES, from MIN_STRIP to MAX_STRIP."""
    fitting = STRIP_BYTES // (4 * heads * keys) // MIN_STRIP * MIN_STRIP
    return min(MAX_STRIP, max(MIN_STRIP, fitting))


def cut_strips(first_keys: Tensor, bounds: list[int], heads: int) -> list[Strip]:
    """The strips of rows whose query i sees the keys from first_keys[i] (T,) to i; `bounds` of their samples, 0 to T.

    Of all ways to cut, at the bounds and at every MIN_STRIP tokens between them, the one with the fewest scores, where
    each strip counts as STRIP_COST more.
    """
    first = first_keys.tolist()
    cuts = [cut for a, b in pairwise(bounds) for cut in range(a, b, MIN_STRIP)] + bounds[-1:]
    cost, previous = [0], [0]
    for place in range(1, len(cuts)):
        ways = []
        for before in range(place - 1, -1, -1):
            queries, keys = cuts[place] - cuts[before], cuts[place] - first[cuts[before]]
            if queries > strip_length(heads, keys):
                break
            ways.append((cost[before] + STRIP_COST + heads * queries * keys, before))
        least, best = min(ways)
        cost.append(least)
        previous.append(best)
    strips = []
    place = len(cuts) - 1
    while place > 0:
        strips.append(mask_strip(first_keys, cuts[previous[place]], cuts[place]))
        place = previous[place]
    return strips[::-1]


def mask_strip(first_keys: Tensor, start: int, stop: int) -> Strip:
    """The strip of these queries, of rows whose query i sees the keys from first_keys[i] (T,) to i."""
    positions = torch.arange(stop)
    first = int(first_keys[start])
    lower = first_keys[start:stop, None]
    # Where all queries begin at the same key, only the square on the diagonal hides anything.
    keys = positions[start if int(first_keys[stop - 1]) == first else first :]
    hidden = (keys < lower) | (keys > positions[start:, None])
    return Strip(start, stop, first, torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf")))


def strips_of_rows(
    cu_seqlens: Tensor, rows: int, width: int, heads: int, window: int | None
) -> list[tuple[slice, list[Strip]]]:
    """Rows and the strips they share: all rows at once where samples lie alike in them, else one after the other.

    A query sees its sample's keys up to itself, at most the last `window`.
    """
    return _strips_of_rows(tuple(find_segments(cu_seqlens, rows, width)), rows, width, heads, window)


@lru_cache(maxsize=4)  # the layers of a model, forward and backward, ask for the same ones
def _strips_of_rows(
    segments: tuple[Segment, ...], rows: int, width: int, heads: int, window: int | None
) -> list[tuple[slice, list[Strip]]]:
    first_keys = torch.empty(rows, width, dtype=torch.int64)
    bounds: list[list[int]] = [[0] for _ in range(rows)]
    for row, start, stop in segments:
        first_keys[row, start:stop] = start
        bounds[row].append(stop)
    if window is not None:
        first_keys = torch.maximum(first_keys, torch.arange(width) - (window - 1))
    if bool((first_keys == first_keys[0]).all()):
        return [(slice(0, rows), cut_strips(first_keys[0], bounds[0], rows * heads))]
    return [(slice(row, row + 1), cut_strips(first_keys[row], bounds[row], heads)) for row in range(rows)]


def split_heads(x: Tensor, groups: int, strip: Strip) -> Tensor:
    """A strip's part of (B, H, T, D), each key head's query heads below one another: (B G, H / G * queries, D)."""
    part = x.unflatten(1, (groups, -1))[..., strip.start : strip.stop, :]
    return part.reshape(x.shape[0] * groups, -1, x.shape[-1])


def join_heads(x: Tensor, whole: Tensor, groups: int, strip: Strip, factor: float = 1.0) -> None:
    """Write what belongs to a strip, (B G, H / G * queries, D), to its place in `whole` (B, H, T, D)."""
    place = whole.unflatten(1, (groups, -1))[..., strip.start : strip.stop, :]
    torch.mul(x.view(place.shape), factor, out=place)


class Product:
    """Batched matrix products written to the same memory in turn, which so stays in the cache."""

    def __init__(self, like: Tensor, strips: list[Strip], dtype: torch.dtype):
        """For products of the strips' queries with their keys; `like` is the query (B, H, T, D)."""
        most = max((strip.stop - strip.start) * (strip.stop - strip.first) for strip in strips)
        self.memory = like.new_empty(like.shape[0] * like.shape[1] * most, dtype=dtype)

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        shape = (left.shape[0], left.shape[1], right.shape[2])
        return torch.bmm(left, right, out=self.memory[: math.prod(shape)].view(shape))


def scratch(query: Tensor, key: Tensor, backward: bool) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what the operators below hold for a moment, where each row is one sample."""
    rows, heads, width, _ = query.shape
    dtype = query.dtype if _native(query.dtype) else torch.float32
    scores = (rows * heads, strip_length(rows * heads, width), width)
    copies = [(tuple(x.shape), dtype) for x in (query, key, key)] if dtype != query.dtype else []
    if backward:
        return [*copies, (scores, dtype), (scores, dtype), *[(tuple(key.shape), torch.float32)] * 4]
    rounded = [(scores, dtype)] if dtype != torch.float32 else []
    return [*copies, (scores, torch.float32), *rounded, *[(tuple(key.shape), torch.float32)] * 2]


def hide(scores: Tensor, strip: Strip) -> None:
    """Mask scores (B G, H / G * queries, keys) in place."""
    queries, masked = strip.mask.shape
    scores.unflatten(1, (-1, queries))[..., scores.shape[-1] - masked :].add_(strip.mask.to(scores.dtype))


def attend_rows(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, strips: list[Strip], output: Tensor, normalizers: Tensor
) -> None:
    """Softmax attention: (B, H, T, D) and twice (B, G, T, D) to `output` (B, H, T, D), `normalizers` (B, H, T) fp32.

    Scores and softmax are fp32, probabilities are rounded to the dtype of `value`.
    """
    groups = key.shape[1]
    transposed, value = key.flatten(0, 1).float().mT.contiguous(), value.flatten(0, 1).contiguous()
    product = Product(query, strips, torch.float32)
    for strip in strips:
        keys = slice(strip.first, strip.stop)
        scores = product(split_heads(query, groups, strip).float() * scaling, transposed[:, :, keys])
        hide(scores, strip)
        largest = scores.amax(-1, keepdim=True)
        probabilities = torch.softmax(scores, -1, out=scores)
        normalizer = largest.sub_(probabilities.amax(-1, keepdim=True).log_())
        join_heads(normalizer, normalizers[..., None], groups, strip)
        join_heads(torch.bmm(probabilities.to(value.dtype), value[:, keys]), output, groups, strip)


def with_constant(x: Tensor, constant: Tensor) -> Tensor:
    """(..., D) and (..., 1) fp32 -> (..., D + 2): the constant in two columns, to twice the digits of x's dtype."""
    high = constant.to(x.dtype)
    return torch.cat((x, high, (constant - high).to(x.dtype)), -1)


def with_ones(x: Tensor) -> Tensor:
    """(B, G, T, D) -> (B G, D + 2, T): a product with it adds what `with_constant` has put beside the rows."""
    transposed = x.flatten(0, 1).mT
    return torch.cat((transposed, transposed.new_ones(transposed.shape[0], 2, transposed.shape[2])), 1)


def attend_rows_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    normalizers: Tensor,
    scaling: float,
    strips: list[Strip],
    grad_query: Tensor,
) -> tuple[Tensor, Tensor]:
    """Writes `grad_query` (B, H, T, D), returns the gradients of key and value, (B, G, T, D) fp32.

    P = exp(s - normalizer) and dS = P * (dO V^T - <dO, O>) (Dao et al. 2022, arXiv:2205.14135, section 3.1). Both
    differences are taken inside the products, in their fp32 sums: what is rounded to bf16 is small where P is not.
    """
    rows, groups, width, head_dim = key.shape
    # A power of two changes no digit of the query; any other factor comes after the product.
    before, after = (scaling, 1.0) if math.frexp(scaling)[0] == 0.5 else (1.0, scaling)
    keys_and_ones, values_and_ones = with_ones(key), with_ones(value)
    key = key.flatten(0, 1).contiguous()
    probability_product, gradient_product = (Product(query, strips, query.dtype) for _ in range(2))
    grad_key, grad_value = (torch.zeros(rows * groups, head_dim, width) for _ in range(2))
    for strip in strips:
        keys = slice(strip.first, strip.stop)
        q, g, out, normalizer = (split_heads(x, groups, strip) for x in (query, grad, output, normalizers[..., None]))
        q = with_constant(q * before, normalizer / -after)
        g = with_constant(g, (g.float() * out).sum(-1, keepdim=True).neg_())
        probabilities = probability_product(q, keys_and_ones[:, :, keys])
        if after != 1:
            probabilities.mul_(after)
        hide(probabilities, strip)
        probabilities.exp_()
        # Products with the small factor transposed are faster than those with the large one.
        grad_value[:, :, keys] += torch.bmm(g.mT, probabilities)[:, :head_dim]
        grad_scores = gradient_product(g, values_and_ones[:, :, keys]).mul_(probabilities)
        grad_key[:, :, keys] += torch.bmm(q.mT, grad_scores)[:, :head_dim]
        join_heads(torch.bmm(grad_scores, key[:, keys]), grad_query, groups, strip, scaling)
    return tuple(x.mT.unflatten(0, (rows, groups)) for x in (grad_key.mul_(after), grad_value))


@torch.library.custom_op("lightning_peft::attend_samples", mutates_args=(), device_types="cpu")
def attend_samples(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scaling: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Causal attention inside each sample: output (B, T, H, D) and log normalisers (B, H, T) fp32.

    query (B, H, T, D); key and value (B, G, T, D); cu_seqlens as `varlen_attention` has it.
    """
    rows, heads, width, head_dim = query.shape
    output = query.new_empty(rows, width, heads, head_dim)
    normalizers = query.new_empty(rows, heads, width, dtype=torch.float32)
    for some, strips in strips_of_rows(cu_seqlens, rows, width, heads, window):
        q, k, v = (computed(x[some]) for x in (query, key, value))
        attend_rows(q, k, v, scaling, strips, output[some].transpose(1, 2), normalizers[some])
    return output, normalizers


@attend_samples.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scaling: float, window: int | None
) -> tuple[Tensor, Tensor]:
    rows, heads, width, head_dim = query.shape
    return query.new_empty(rows, width, heads, head_dim), query.new_empty(rows, heads, width, dtype=torch.float32)


@torch.library.custom_op("lightning_peft::attend_samples_backward", mutates_args=(), device_types="cpu")
def attend_samples_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    normalizers: Tensor,
    cu_seqlens: Tensor,
    scaling: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend_samples` with respect to query, key and value."""
    rows, heads, width, _ = query.shape
    gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for some, strips in strips_of_rows(cu_seqlens, rows, width, heads, window):
        g, out = (computed(x[some].transpose(1, 2)) for x in (grad_output, output))
        q, k, v = (computed(x[some]) for x in (query, key, value))
        gradients[1][some], gradients[2][some] = attend_rows_backward(
            g, q, k, v, out, normalizers[some], scaling, strips, gradients[0][some]
        )
    return gradients


@attend_samples_backward.register_fake
def _(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, cu_seqlens, ctx.scaling, ctx.window = inputs
    ctx.save_for_backward(query, key, value, *output, cu_seqlens)


def _backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = attend_samples_backward(grad_output, *ctx.saved_tensors, ctx.scaling, ctx.window)
    return *gradients, None, None, None


attend_samples.register_autograd(_backward, setup_context=_save_for_backward)


def computed(x: Tensor) -> Tensor:
    """x in the dtype this processor computes it in."""
    return x if _native(x.dtype) else x.float()


@cache
def _native(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
