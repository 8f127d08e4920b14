"""The product with a low-rank change bent element by element in a sinc basis: the fused form of LR-LoRA."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

ELEMENTS_AT_ONCE = 2**20
"""Elements of the dense change that exist at a time, in the forward and in the backward pass."""
NEAR = 0.1
"""Distance from a node below which the slope of sinc is taken from its series, where the quotient cancels."""


class Grid(NamedTuple):
    """The nodes of the basis, evenly spaced."""

    first: float
    step: float
    nodes: int

    def places(self, u: Tensor) -> Tensor:
        """Return the places of u among the nodes: node i is at i."""
        return (u - self.first) / self.step


class Wave(NamedTuple):
    """The terms that the functions of all nodes share at a place: node i's is (-1)^i sine / (place - i)."""

    sine: Tensor
    """sin(pi place) / pi."""
    cosine: Tensor
    """cos(pi place)."""
    nearest: Tensor
    """int64; the number of the nearest node, from -1, which stands for none, to the number of nodes, likewise."""
    near: Tensor
    """sinc(place - nearest) where the nearest node is nearer than `NEAR`; 0 elsewhere."""
    gap: Tensor
    """place - nearest there; 0 elsewhere."""

    @classmethod
    def at(cls, places: Tensor, nodes: int) -> "Wave":
        nearest = places.round()
        gap = places - nearest  # the gap is exact, so sines next to a node are as well
        odd = 1 - 2 * nearest.remainder(2)
        angle = gap * math.pi
        sine, cosine = angle.sin().mul_(odd).div_(math.pi), angle.cos_().mul_(odd)
        far = gap.abs() >= NEAR
        gap.masked_fill_(far, 0.0)
        return cls(sine, cosine, nearest.clamp_(-1, nodes).to(torch.int64), torch.sinc(gap).masked_fill_(far, 0.0), gap)


def reciprocals(places: Tensor, node: int, into: Tensor) -> Tensor:
    """Write 1 / (places - node) into a tensor, with 0 where the node is near, and return it."""
    torch.sub(places, node, out=into)
    near = into.abs() < NEAR
    return into.reciprocal_().masked_fill_(near, 0.0)


def of_nearest(wave: Wave, coefficients: Tensor) -> Tensor:
    """Return the coefficient of the nearest node at every place, 0 where it is none of them."""
    return torch.nn.functional.pad(coefficients, (1, 1))[wave.nearest + 1]


def values_at_zero(width: Tensor, grid: Grid) -> Tensor:
    """Return the functions of all nodes at z = 0, (nodes,)."""
    place = grid.places(torch.zeros_like(width))
    return torch.sinc(place - torch.arange(grid.nodes, device=width.device, dtype=width.dtype))


def bent(product: Tensor, coefficients: Tensor, width: Tensor, grid: Grid) -> Tensor:
    """Return z + width * sum_i c_i [sinc(v - i) - sinc(v_0 - i)] for every z; v is the place of z / width, v_0 of 0.

    One sine serves all nodes, three passes a node.
    """
    places = grid.places(product / width)
    wave = Wave.at(places, grid.nodes)
    total, inverse = torch.zeros_like(product), torch.empty_like(product)
    for node in range(grid.nodes):
        total.addcmul_(reciprocals(places, node, inverse), coefficients[node], value=(-1) ** node)
    total.mul_(wave.sine).addcmul_(wave.near, of_nearest(wave, coefficients))
    return total.sub_(coefficients @ values_at_zero(width, grid)).mul_(width).add_(product)


def sinc_product(x: Tensor, A: Tensor, B: Tensor, coefficients: Tensor, width: Tensor, grid: Grid) -> Tensor:
    """Return x bent(B A)^T, (..., out_features), in the dtype of x.

    A is (rank, in_features), B (out_features, rank), the coefficients (nodes,), the width (1,). Some rows of B A exist
    at a time; they are formed again in the backward pass, not kept.
    """
    return SincProduct.apply(x, A, B, coefficients, width, grid)


class SincProduct(torch.autograd.Function):
    """x bent(B A)^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, coefficients: Tensor, width: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward(x, A, B, coefficients, width)
        ctx.grid = grid
        flat = x.reshape(-1, x.shape[-1])
        parts = [flat @ bent(B[rows] @ A, coefficients, width, grid).to(x.dtype).t() for rows in row_slices(A, B)]
        return torch.cat(parts, dim=1).view(*x.shape[:-1], len(B))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, coefficients, width = ctx.saved_tensors
        grad, flat = grads[0].reshape(-1, len(B)), x.reshape(-1, x.shape[-1])
        grad_x = torch.zeros_like(flat) if ctx.needs_input_grad[0] else None
        grad_A, grad_B = torch.zeros_like(A), torch.empty_like(B)
        grad_c, grad_width = torch.zeros_like(coefficients), torch.zeros_like(width)
        for rows in row_slices(A, B):
            product = B[rows] @ A
            change = (grad[:, rows].t() @ flat).to(A.dtype)
            whole, to_product = _gradients(product, change, coefficients, width, ctx.grid, grad_c, grad_width)
            if grad_x is not None:
                grad_x.addmm_(grad[:, rows], whole.to(x.dtype))
            grad_A.addmm_(B[rows].t(), to_product)
            torch.mm(to_product, A.t(), out=grad_B[rows])
        return None if grad_x is None else grad_x.view_as(x), grad_A, grad_B, grad_c, grad_width, None


def _gradients(
    product: Tensor, change: Tensor, coefficients: Tensor, width: Tensor, grid: Grid, grad_c: Tensor, grad_width: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the bent product and the gradient of the product, and add up those of the coefficients and the width."""
    u = product / width
    places = grid.places(u)
    wave = Wave.at(places, grid.nodes)
    first, second, inverse = torch.zeros_like(product), torch.zeros_like(product), torch.empty_like(product)
    at_zero, found = values_at_zero(width, grid), []
    for node in range(grid.nodes):
        reciprocals(places, node, inverse)
        # This is a product with a mask: sums by index are added in another order each time on CUDA.
        near = (wave.nearest == node).to(change.dtype)
        # The value at zero is taken off before the sum: the sums of both are far larger than their difference.
        value = (near.mul_(wave.near)).addcmul_(inverse, wave.sine, value=(-1) ** node).sub_(at_zero[node])
        found.append(torch.dot(change.flatten(), value.flatten()))
        first.addcmul_(inverse, coefficients[node], value=(-1) ** node)
        second.addcmul_(inverse.square_(), coefficients[node], value=(-1) ** node)
    # d sinc(x) / dx = (cos(pi x) - sinc(x)) / x; near a node the quotient cancels, so the series is taken.
    square = (math.pi * wave.gap) ** 2
    series = -(math.pi**2) / 3 * wave.gap * (1 - square / 10 * (1 - square / 28 * (1 - square / 54)))
    own = of_nearest(wave, coefficients)
    steepness = (wave.cosine * first).sub_(wave.sine * second).addcmul_(series, own).div_(grid.step)
    total = first.mul_(wave.sine).addcmul_(wave.near, own).sub_(coefficients @ at_zero)
    grad_c += width * torch.stack(found)
    grad_width += (change * (total - u * steepness)).sum()
    return total.mul_(width).add_(product), change * steepness.add_(1)


def row_slices(A: Tensor, B: Tensor) -> Iterator[slice]:
    """Return the rows of B A that are formed together, from the first to the last."""
    count = max(1, ELEMENTS_AT_ONCE // A.shape[1])
    return (slice(start, min(start + count, len(B))) for start in range(0, len(B), count))
