"""Changes inside the products of their frozen layers: the plain formula, in value and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lightning_peft.kernels import codes
from lightning_peft.kernels.frozen_linear import DENSE, Base
from lightning_peft.kernels.inside_product import Edges, add_low_rank_inside, copy_together, room_for

SIZES, RANKS, IN_FEATURES, PLACE = (6, 4, 5), (2, 3, 1), 64, 1
ROWS, COLUMNS, STARTS = room_for(SIZES[PLACE], RANKS), room_for(IN_FEATURES, RANKS), (0, 2, 5)


def layers(form, takes_wide_input, dtype):
    """Return each weight, what is stored of it, A, B, and their copies at the edges."""
    torch.manual_seed(0)
    stored = [torch.randn(size, IN_FEATURES, dtype=dtype) for size in SIZES]
    weights, room_only = stored, form != DENSE
    if room_only:
        stored = [codes.quantize(weight, form) for weight in stored]
        weights = [codes.dequantize(own, form, 64, dtype) for own in stored]
    A = [torch.randn(rank, IN_FEATURES, dtype=dtype, requires_grad=True) for rank in RANKS]
    B = [torch.randn(size, rank, dtype=dtype, requires_grad=True) for size, rank in zip(SIZES, RANKS, strict=True)]
    stack = torch.cat(A).detach()
    below = F.pad(stack, (0, 0, 0, ROWS - len(stack)))
    if not room_only:
        below = torch.cat([weights[PLACE], below])
    stack = below[-ROWS:][: len(stack)]
    copies = [own.detach() for own in B]
    if not takes_wide_input:
        return weights, stored, A, B, Edges(PLACE, below, stack, (), tuple(copies))
    beside = []
    for weight, own, start in zip(weights, copies, STARTS, strict=True):
        edge = F.pad(own, (start, COLUMNS - start - own.shape[1]))
        beside.append(edge if room_only else torch.cat([weight, edge], 1))
    first = 0 if room_only else IN_FEATURES
    parts = [own[:, first + at : first + at + rank] for own, at, rank in zip(beside, STARTS, RANKS, strict=True)]
    return weights, stored, A, B, Edges(PLACE, below, stack, tuple(beside), tuple(parts))


@pytest.mark.parametrize("form", [DENSE, "nf4"])
@pytest.mark.parametrize("takes_wide_input", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(9,), (2, 3)], ids=str)
def test_change_is_in_the_product(form, takes_wide_input, has_bias, shape):
    dtype = torch.float64
    weights, stored, A, B, edges = layers(form, takes_wide_input, dtype)
    biases = [torch.randn(size, dtype=dtype) if has_bias else None for size in SIZES]
    bases = [
        Base(dtype, form, 64, ((own, bias) if form == DENSE else (*own, bias)))
        for own, bias in zip(stored, biases, strict=True)
    ]
    x = torch.randn(*shape, IN_FEATURES, dtype=dtype, requires_grad=True)
    found = add_low_rank_inside(bases, edges, x, list(zip(A, B, strict=True)), 0.5)
    expected = tuple(
        F.linear(x, weight, bias) + 0.5 * (x @ down.t() @ up.t())
        for weight, bias, down, up in zip(weights, biases, A, B, strict=True)
    )
    assert_close(found, expected)
    grads = [torch.randn_like(output) for output in expected]
    assert_close(torch.autograd.grad(found, [x, *A, *B], grads), torch.autograd.grad(expected, [x, *A, *B], grads))


def test_inputs_without_gradient_get_none():
    _, stored, A, B, edges = layers(DENSE, True, torch.float32)
    bases = [Base(torch.float32, DENSE, 0, (weight, None)) for weight in stored]
    x = torch.randn(4, IN_FEATURES)
    sum(y.sum() for y in add_low_rank_inside(bases, edges, x, list(zip(A, B, strict=True)), 1.0)).backward()
    assert x.grad is None and all(factor.grad is not None for factor in (*A, *B))


def test_matrices_are_copied_to_wherever_they_go():
    torch.manual_seed(0)
    sources = [torch.randn(3, 4), torch.randn(5, 2)]
    into = [torch.zeros(6, 8)[1:4, 2:6], torch.zeros(5, 2)]
    copy_together(sources, into)
    assert_close(into, sources)
