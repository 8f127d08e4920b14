"""The parameters of adapters that FSDP has cut, whole for a pass through a model that is not theirs."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lightning_peft.adapters.inject import adapters
from lightning_peft.optim.sharded import local


@contextmanager
def whole_adapters(model: nn.Module) -> Iterator[None]:
    """Let the adapters of a model hold their parameters whole, inside the block, where they hold slices.

    One collective gathers all of them; every rank has to call it. The whole ones take gradients of their own.
    """
    places: list[tuple[nn.Module, str, Any]] = [
        (module, name, parameter)
        for _, adapter in adapters(model)
        for part, module in adapter.named_modules()
        if not f"{part}.".startswith("base_layer.")
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    sliced = list(dict.fromkeys(parameter for _, _, parameter in places))
    whole = dict(zip(sliced, gathered_at_once(sliced), strict=True))
    for module, name, parameter in places:
        module._parameters[name] = whole[parameter]
    try:
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


@torch.no_grad()
def gathered_at_once(sliced: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Return parameters, whole, of which each rank holds rows."""
    if not sliced:
        return []
    mesh = mesh_of(sliced[0])
    own = torch.cat([padded(local(parameter), rows_of_a_rank(parameter)) for parameter in sliced])
    found = own.new_empty(mesh.size() * own.numel())
    dist.all_gather_into_tensor(found, own, group=mesh.get_group())
    parts = found.view(mesh.size(), -1).split([size_on_a_rank(parameter) for parameter in sliced], 1)
    return [
        nn.Parameter(part.reshape(-1, *p.shape[1:])[: len(p)].to(p.dtype), requires_grad=p.requires_grad)
        for p, part in zip(sliced, parts, strict=True)
    ]


@torch.no_grad()
def sliced_means(gradients: Sequence[Tensor | None], sliced: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Return this rank's rows of the means over the ranks of whole gradients, one for each parameter, as FSDP does.

    A gradient that is None is so on every rank. Gradients of parameters that are not sliced are returned as they are.
    """
    pairs = [(grad, p) for grad, p in zip(gradients, sliced, strict=True) if grad is not None]
    if not pairs or not isinstance(pairs[0][1], DTensor):
        return list(gradients)
    mesh = mesh_of(pairs[0][1])
    ranks = mesh.size()
    every = torch.cat([padded(grad, ranks * rows_of_a_rank(p)).view(ranks, -1) for grad, p in pairs], 1)
    own = every.new_empty(every.shape[1])
    dist.reduce_scatter_tensor(own, every.view(-1), group=mesh.get_group())
    parts = iter(own.div_(ranks).split([size_on_a_rank(p) for _, p in pairs]))
    return [None if grad is None else like(p, next(parts)) for grad, p in zip(gradients, sliced, strict=True)]


def mesh_of(parameter: Tensor) -> DeviceMesh:
    assert isinstance(parameter, DTensor)
    return parameter.device_mesh


def rows_of_a_rank(parameter: Tensor) -> int:
    """Return the rows of the first rank, to which FSDP2 pads those of the others."""
    return math.ceil(len(parameter) / mesh_of(parameter).size())


def size_on_a_rank(parameter: nn.Parameter) -> int:
    return rows_of_a_rank(parameter) * math.prod(parameter.shape[1:])


def padded(rows: Tensor, count: int) -> Tensor:
    """Return so many rows, the missing ones zero, in one line."""
    flat = rows.reshape(-1)
    return F.pad(flat, (0, count * math.prod(rows.shape[1:]) - flat.numel()))


def like(parameter: nn.Parameter, values: Tensor) -> Tensor:
    """Return padded rows of this rank as a tensor that is cut as a parameter is."""
    assert isinstance(parameter, DTensor)
    rows = values.view(-1, *parameter.shape[1:])[: len(local(parameter))]
    return DTensor.from_local(
        rows, parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip
