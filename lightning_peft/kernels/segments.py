"""Several low-rank changes beside one frozen layer, each on rows of its own, in one autograd function.

The layer's product is taken once for all rows, each change's on its own rows. Whatever the numbers of one change are,
not finite ones included, they stay in its rows: `LowRankProduct` on the rows alone is what a test holds this to.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.kernels import products, segment_changes
from lightning_peft.kernels.frozen_linear import (
    GIVEN,
    Base,
    base_gradients,
    dense_weight,
    factor_gradients,
    mark_written,
)
from lightning_peft.kernels.low_rank import dropout_mask, random_state


@dataclass
class RandomState:
    """The place of a stream of random numbers; every draw moves it on."""

    state: Tensor
    """The state, as the generator of the device has it."""

    @contextmanager
    def drawn_from(self, device: torch.device) -> Iterator[None]:
        """Let torch's functions on the device draw from this stream, inside the block; their own stays where it is."""
        generator = random_state(device)
        before = generator.get_state()
        generator.set_state(self.state)
        try:
            yield
            self.state = generator.get_state()
        finally:
            generator.set_state(before)

    def dropout(self, x: Tensor, probability: float) -> Tensor:
        """Return what `F.dropout` gives with the device's generator at this place."""
        with self.drawn_from(x.device):
            return F.dropout(x.contiguous(), probability)


class Segment(NamedTuple):
    """The rows that one change is for, and what it takes beside its factors."""

    start: int
    stop: int
    scaling: float
    dropout: float = 0.0
    random: RandomState | None = None
    """Stream that the dropped inputs are drawn from; not read without dropout."""

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    def scaled(self, A: Tensor) -> Tensor:
        """Return scaling * A; A itself where that is the same, as a server has hundreds of them scaled already."""
        return A if self.scaling == 1 else self.scaling * A


class RowProduct(NamedTuple):
    """A small product on some rows: inner (rows, R) times factor (R, width)."""

    rows: slice
    inner: Tensor
    factor: Tensor


def add_segments(
    base: Base, x: Tensor, segments: Sequence[Segment], factors: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """Return base + scaling * dropout(x) A^T B^T on the rows of each segment, the base alone elsewhere: (..., out).

    Rows are those of x (..., in_features) flattened; factors has A (R, in_features) and B (out_features, R) of each
    segment. Segments do not overlap.
    """
    flat = [factor for pair in factors for factor in pair]
    if not any(segment.dropout for segment in segments):
        rows = [segment_changes.ChangedRows(segment.start, segment.stop, segment.scaling) for segment in segments]
        if segment_changes.takes(base, x, rows, flat):
            return segment_changes.add_changes(base, x, rows, flat)
    return SegmentSum.apply(base.first, x, tuple(segments), len(flat), *flat, *base.rest())


class SegmentSum(torch.autograd.Function):
    """`add_segments`. Saves x once for all segments, and the (rows, R) product of each."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, x: Tensor, segments: tuple[Segment, ...], count: int, *rest: Any) -> Tensor:
        factors, base = rest[:count], Base.of(first, rest[count:])
        dtype = base.dtype
        rows = x.reshape(-1, x.shape[-1])
        cast = rows.to(dtype)
        parts: list[RowProduct] = []
        states: list[Tensor | None] = []
        for segment, A, B in zip(segments, factors[::2], factors[1::2], strict=True):
            own = cast[segment.rows]
            if segment.dropout:
                assert segment.random is not None
                states.append(segment.random.state)
                own = segment.random.dropout(rows[segment.rows], segment.dropout).to(dtype)
            else:
                states.append(None)
            inner = own @ segment.scaled(A).to(dtype).t()
            parts.append(RowProduct(segment.rows, inner, B.to(dtype).t()))
        if base.form == GIVEN:
            output = base.first
            flat = output.view(-1, output.shape[-1])
            for part in parts:
                flat[part.rows].addmm_(part.inner, part.factor)
        else:
            bias = base.tensors[-1]
            bias = None if bias is None else bias.to(dtype)
            output = sum_with_parts(cast, dense_weight(base), parts, bias, True).view(*x.shape[:-1], -1)
        mark_written(ctx, base, output)
        needs_A = any(ctx.needs_input_grad[4 : 4 + count : 2])
        ctx.save_for_backward(x if needs_A else None, *(part.inner for part in parts), *factors, *base.kept())
        ctx.base, ctx.segments, ctx.states = base._replace(tensors=()), segments, states
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        count = len(ctx.segments)
        x, *saved = ctx.saved_tensors
        inners, factors, frozen = saved[:count], saved[count : 3 * count], saved[3 * count :]
        base = ctx.base._replace(tensors=tuple(frozen))
        dtype = grad.dtype
        grad_rows = grad.reshape(-1, grad.shape[-1])
        needs_x, needs = ctx.needs_input_grad[1], ctx.needs_input_grad[4 : 4 + 2 * count]
        rows = None if x is None else x.reshape(-1, x.shape[-1])
        grad_factors: list[Tensor | None] = []
        parts, masked = [], []
        for number, segment in enumerate(ctx.segments):
            A, B, inner = factors[2 * number], factors[2 * number + 1], inners[number]
            needs_A, needs_B = needs[2 * number : 2 * number + 2]
            own_grad, mask, own = grad_rows[segment.rows], None, None
            if segment.dropout and (needs_x or needs_A):
                shape = torch.Size((segment.stop - segment.start, A.shape[1]))
                like = grad.new_empty(0, dtype=ctx.x_dtype)
                mask = dropout_mask(shape, segment.dropout, like, ctx.states[number])
            if needs_A:
                assert rows is not None
                own = rows[segment.rows]
                own = (own if mask is None else own * mask).to(dtype)
            grad_inner, grad_A, grad_B = factor_gradients(own_grad, own, inner, B.to(dtype), needs_B)
            grad_factors.append(None if grad_A is None else grad_A.to(A.dtype).mul_(segment.scaling))
            grad_factors.append(None if grad_B is None else grad_B.to(B.dtype))
            scaled_A = segment.scaled(A).to(dtype)
            if not needs_x:
                continue
            if mask is None:
                parts.append(RowProduct(segment.rows, grad_inner, scaled_A))
            else:
                masked.append((segment.rows, mask.mul_(grad_inner @ scaled_A)))
        del x, rows  # they are large, and the base's gradient is about to be made
        grad_x = None
        if needs_x:
            if base.form == GIVEN:
                grad_x = grad_rows.new_zeros(len(grad_rows), ctx.x_shape[-1])
                for part in parts:
                    torch.mm(part.inner, part.factor, out=grad_x[part.rows])
            else:
                grad_x = sum_with_parts(grad_rows, dense_weight(base), parts, None, False)
            for where, product in masked:
                grad_x[where].add_(product)
            grad_x = grad_x.view(ctx.x_shape).to(ctx.x_dtype)
        grad_first, grad_rest = base_gradients(grad, base, ctx.needs_input_grad)
        return grad_first, grad_x, None, None, *grad_factors, *grad_rest


def sum_with_parts(
    rows: Tensor, weight: Tensor, parts: Sequence[RowProduct], bias: Tensor | None, transposed: bool
) -> Tensor:
    """Return rows W + bias, (N, width), with each part's product added to its rows; rounded as `low_rank_sum` does.

    rows (N, in), bias (width,), weight (in, width), or with `transposed` (width, in) for W^T: one dtype.
    """
    output = rows.new_empty(len(rows), weight.shape[0 if transposed else 1])
    if parts and products.takes_sum(rows, weight, parts[0].inner, transposed):
        sum_by_kernel(rows, weight, parts, bias, transposed, output)
        return output
    weight = weight.t() if transposed else weight
    if rows.dtype.itemsize == 2:
        # The small products come first and the bias last: see `low_rank_sum`.
        covered = 0
        for part in parts:
            torch.mm(part.inner, part.factor, out=output[part.rows])
            covered += part.rows.stop - part.rows.start
        bare = list(gaps(parts, len(rows))) if covered < len(rows) else []
        for gap in bare:
            output[gap].zero_()
        output.addmm_(rows, weight)
        if bias is not None:
            for part in parts:
                output[part.rows].add_(bias)
            for gap in bare:  # rows without a change are those of the plain layer, which rounds once
                torch.addmm(bias, rows[gap], weight, out=output[gap])
        return output
    if bias is None:
        torch.mm(rows, weight, out=output)
    else:
        torch.addmm(bias, rows, weight, out=output)
    for part in parts:
        output[part.rows].addmm_(part.inner, part.factor)
    return output


def gaps(parts: Sequence[RowProduct], count: int) -> Sequence[slice]:
    """Return the runs of `count` rows that no part is for."""
    found, end = [], 0
    for rows in sorted((part.rows for part in parts), key=lambda rows: rows.start):
        found.append(slice(end, rows.start))
        end = rows.stop
    return [gap for gap in (*found, slice(end, count)) if gap.start < gap.stop]


def sum_by_kernel(
    rows: Tensor, weight: Tensor, parts: Sequence[RowProduct], bias: Tensor | None, transposed: bool, output: Tensor
) -> None:
    """Write `sum_with_parts` into the output by the compiled kernel.

    Segments with rows enough for a copy of the weight get a product each. The others share one, in which each part has
    columns of its own and zeros elsewhere.
    """
    is_large = all(part.rows.stop - part.rows.start >= products.MIN_ROWS for part in parts)
    if is_large and not gaps(parts, len(rows)):
        for part in parts:
            factor = part.factor.t() if transposed else part.factor
            products.sum_by_kernel(
                rows[part.rows], weight, part.inner, factor, None, bias, transposed, output[part.rows]
            )
        return
    inner = rows.new_zeros(len(rows), sum(part.inner.shape[1] for part in parts))
    start = 0
    for part in parts:
        columns = slice(start, start + part.inner.shape[1])
        # Zero times what is not finite is not zero: it is kept in the rows of its own, by way of the inner product.
        inner[part.rows, columns] = part.inner + 0 * part.factor.sum()
        start = columns.stop
    factor = torch.cat([part.factor for part in parts]).nan_to_num(0, 0, 0)
    factor = factor.t() if transposed else factor
    products.sum_by_kernel(rows, weight, inner, factor, None, bias, transposed, output)
