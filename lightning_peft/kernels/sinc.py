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
    """What the functions of all nodes share at one place: sin and cos of pi times the distance to the nearest."""

    sine: Tensor
    cosine: Tensor
    odd: Tensor
    """1 where the nearest node has an even number, -1 where it has an odd one."""

    @classmethod
    def at(cls, places: Tensor) -> "Wave":
        nearest = places.round()
        angle = (places - nearest).mul_(math.pi)
        return cls(angle.sin(), angle.cos_(), 1 - 2 * nearest.remainder_(2))

    def sinc(self, places: Tensor, node: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return sinc(places - node), cos(pi (places - node)) and the distance, the sinc from the one sine."""
        sign = self.odd if node % 2 == 0 else -self.odd
        distance = places - node
        values = (sign * self.sine).div_(distance).div_(math.pi).masked_fill_(distance == 0, 1.0)
        return values, sign * self.cosine, distance


def slope(sinc: Tensor, cosine: Tensor, distance: Tensor) -> Tensor:
    """Return the derivative of sinc at a distance from its node."""
    square = (math.pi * distance) ** 2
    series = -(math.pi**2) / 3 * distance * (1 - square / 10 * (1 - square / 28 * (1 - square / 54)))
    return torch.where(distance.abs() < NEAR, series, (cosine - sinc) / distance)


def bent(product: Tensor, coefficients: Tensor, width: Tensor, grid: Grid) -> Tensor:
    """Return z + width * sum_i c_i [sinc(v - i) - sinc(v_0 - i)] for every z; v is the place of z / width, v_0 of 0."""
    places = grid.places(product / width)
    wave, start = Wave.at(places), grid.places(torch.zeros_like(width))
    start_wave = Wave.at(start)
    total = torch.zeros_like(product)
    for node in range(grid.nodes):
        at_zero = start_wave.sinc(start, node)[0]
        total += coefficients[node] * (wave.sinc(places, node)[0] - at_zero)
    return total.mul_(width).add_(product)


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
    wave, start = Wave.at(places), grid.places(torch.zeros_like(width))
    start_wave = Wave.at(start)
    total, steepness = torch.zeros_like(product), torch.zeros_like(product)
    for node in range(grid.nodes):
        values, cosine, distance = wave.sinc(places, node)
        steepness += coefficients[node] / grid.step * slope(values, cosine, distance)
        values -= start_wave.sinc(start, node)[0]
        total += coefficients[node] * values
        grad_c[node] += width[0] * (change * values).sum()
    grad_width += (change * (total - u * steepness)).sum()
    return total.mul_(width).add_(product), change * steepness.add_(1)


def row_slices(A: Tensor, B: Tensor) -> Iterator[slice]:
    """Return the rows of B A that are formed together, from the first to the last."""
    count = max(1, ELEMENTS_AT_ONCE // A.shape[1])
    return (slice(start, min(start + count, len(B))) for start in range(0, len(B), count))
