"""Any optimiser over sharded parameters, and its state by parameter name, whole, at any number of ranks.

bitsandbytes' optimisers cannot take a DTensor, so every optimiser is given this rank's rows of each parameter, in the
same memory. AdamW works element by element: the rows of all ranks together take the step the whole would.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

STATE_BLOCK = 256
"""Values that share an fp32 scale in bitsandbytes' 8-bit states."""
SCALES = {"state1": "absmax1", "state2": "absmax2"}
LEVELS = {"state1": "qmap1", "state2": "qmap2"}
"""Names in bitsandbytes' states: of the moments, their 8-bit blocks' scales, and the values the codes stand for."""


def local(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a sharded tensor, in the same memory; any other tensor as it is."""
    # The import takes half a second, which naming the optimisers there are should not cost.
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_rows(parameter: nn.Parameter) -> nn.Parameter:
    """Return what an optimiser steps in place of a parameter that may be sharded; see `hand_over_gradients`."""
    held = local(parameter)
    if held is parameter:
        return parameter
    rows = nn.Parameter(held.detach())
    rows.whole = parameter  # type: ignore[attr-defined]
    return rows


def hand_over_gradients(optimizer: Optimizer) -> None:
    """Give the optimiser's rows the gradients of the sharded parameters they belong to."""
    for group in optimizer.param_groups:
        for rows in group["params"]:
            whole = getattr(rows, "whole", None)
            if whole is not None and rows.numel():
                rows.grad = None if whole.grad is None else local(whole.grad)


def drop_gradients(optimizer: Optimizer) -> None:
    """Free the gradients of the optimiser's rows and of the sharded parameters they belong to.

    The model's own gradients stay: between a forward and its backward pass they are the gathered ones for every
    group that stays gathered, and its shards would add up the gradients of all steps.
    """
    optimizer.zero_grad()
    for group in optimizer.param_groups:
        for rows in group["params"]:
            if hasattr(rows, "whole"):
                rows.whole.grad = None


def row_counts(parameter: Tensor) -> list[int]:
    """Return the rows of the parameter on each rank, as FSDP2 cuts them: one entry where it is not sharded."""
    whole = getattr(parameter, "whole", None)
    if whole is None:
        return [parameter.shape[0] if parameter.ndim else 1]
    rows, ranks = whole.shape[0], whole.device_mesh.size()
    chunk = math.ceil(rows / ranks)
    return [max(0, min(chunk, rows - rank * chunk)) for rank in range(ranks)]


def named_parameters(optimizer: Optimizer) -> list[tuple[str, nn.Parameter]]:
    """Return the optimiser's parameters with their names, in its order."""
    return [
        pair for group in optimizer.param_groups for pair in zip(group["param_names"], group["params"], strict=True)
    ]


def named_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return {"groups": options by group name, "state": state by parameter name}, tensors whole and on the host.

    With sharded parameters every rank must call it and rank zero alone gets the state. `rows` of an entry says how many
    rows each rank held: the blocks of an 8-bit state begin anew at each.
    """
    state: dict[str, Any] = {}
    if hasattr(optimizer, "wait_for_states"):
        optimizer.wait_for_states()
    for name, parameter in named_parameters(optimizer):
        own = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in optimizer.state.get(parameter, {}).items()}
        own = {key: value for key, value in own.items() if key not in LEVELS.values()}
        pieces = [own]
        if hasattr(parameter, "whole"):
            pieces = [{} for _ in range(dist.get_world_size())]
            dist.gather_object(own, pieces if dist.get_rank() == 0 else None, dst=0)
        if found := [piece for piece in pieces if piece]:
            state[name] = {"rows": row_counts(parameter), **_joined(optimizer, found)}
    groups = [{k: v for k, v in g.items() if k not in ("params", "param_names")} for g in optimizer.param_groups]
    return {"groups": {group["name"]: group for group in groups}, "state": state}


def load_named_state(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Take up a state that `named_state` gave, at this number of ranks. Raises ValueError for other parameters."""
    named = named_parameters(optimizer)
    if unknown := sorted(saved["state"].keys() - {name for name, _ in named}):
        raise ValueError(f"checkpoint: its optimiser has state for {unknown[0]}, which is not trained here")
    state = {
        index: _own_rows(optimizer, parameter, saved["state"][name])
        for index, (name, parameter) in enumerate(named)
        if name in saved["state"] and parameter.numel()
    }
    groups = [g | saved["groups"].get(g["name"], {}) for g in optimizer.state_dict()["param_groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _own_rows(optimizer: Optimizer, parameter: nn.Parameter, entry: dict[str, Any]) -> dict[str, Any]:
    """Return this rank's part of a parameter's saved state, in the form the optimiser keeps it."""
    rank = dist.get_rank() if hasattr(parameter, "whole") else 0
    counts, saved_counts = row_counts(parameter), entry["rows"]
    width = parameter[0].numel()
    rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    entry = {key: value for key, value in entry.items() if key != "rows"}
    same_blocks = counts == saved_counts or (_is_aligned(counts, width) and _is_aligned(saved_counts, width))
    if "absmax1" in entry and same_blocks and _keeps_8bit(optimizer, parameter):
        before = sum(_blocks(count, width) for count in counts[:rank])
        own = _cut(entry, rows, slice(before, before + _blocks(counts[rank], width)))
        return own | {level: _levels(optimizer, level) for level in LEVELS.values()}
    own = _cut(_in_fp32(optimizer, entry, saved_counts, width), rows, slice(0))
    return quantized(optimizer, own) if _keeps_8bit(optimizer, parameter) else own


def _joined(optimizer: Optimizer, pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the ranks' pieces of one parameter's state, one below the other.

    A rank whose piece is too small for 8 bits keeps fp32: where others have 8 bits, all become fp32.
    """
    if len({"absmax1" in piece for piece in pieces}) > 1:
        pieces = [dequantized(optimizer, piece) for piece in pieces]
    return {
        key: torch.cat([piece[key] for piece in pieces]) if isinstance(value, Tensor) and value.ndim else value
        for key, value in pieces[0].items()
    }


def _in_fp32(optimizer: Optimizer, entry: dict[str, Any], counts: list[int], width: int) -> dict[str, Any]:
    """Return a whole saved state without 8-bit codes; `counts` are the rows of the pieces quantised."""
    if "absmax1" not in entry:
        return entry
    pieces, row, block = [], 0, 0
    for count in filter(None, counts):
        blocks = _blocks(count, width)
        piece = _cut(entry, slice(row, row + count), slice(block, block + blocks))
        pieces.append(dequantized(optimizer, piece))
        row, block = row + count, block + blocks
    return _joined(optimizer, pieces)


def _cut(entry: dict[str, Any], rows: slice, blocks: slice) -> dict[str, Any]:
    return {
        key: value[blocks if key in SCALES.values() else rows].clone()
        if isinstance(value, Tensor) and value.ndim
        else value
        for key, value in entry.items()
    }


def _blocks(rows: int, width: int) -> int:
    return math.ceil(rows * width / STATE_BLOCK)


def _is_aligned(counts: list[int], width: int) -> bool:
    """Return whether every rank's rows begin at a block of the whole tensor, so that blocks depend on no cut."""
    return all(sum(counts[:rank]) * width % STATE_BLOCK == 0 for rank in range(len(counts)))


def _keeps_8bit(optimizer: Optimizer, parameter: Tensor) -> bool:
    options = getattr(optimizer, "args", None)  # bitsandbytes' optimisers have them
    return options is not None and options.optim_bits == 8 and parameter.numel() >= options.min_8bit_size


def _levels(optimizer: Any, level: str) -> Tensor:
    """Return the 256 values that 8-bit codes of a moment stand for, (256,) fp32."""
    if not optimizer.name2qmap:
        optimizer.fill_qmap()
    return optimizer.name2qmap["dynamic" if level == "qmap1" else "udynamic"]


def dequantized(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return bitsandbytes' state of one parameter with both moments in fp32, on the host."""
    if "absmax1" not in state:
        return state
    from bitsandbytes.functional import dequantize_blockwise  # the import is slow; who has 8-bit states has it already

    plain = {key: value for key, value in state.items() if key not in SCALES.values()}
    for key, scale in SCALES.items():
        levels = _levels(optimizer, LEVELS[key]).cpu()
        plain[key] = dequantize_blockwise(state[key], absmax=state[scale], code=levels, blocksize=STATE_BLOCK)
    return plain


def quantized(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return the reverse of `dequantized`, to the nearest codes."""
    from bitsandbytes.functional import quantize_blockwise  # the import is slow; who has 8-bit states has it already

    coded = dict(state)
    for key, scale in SCALES.items():
        levels = _levels(optimizer, LEVELS[key])
        coded[key], statistics = quantize_blockwise(state[key], code=levels.cpu(), blocksize=STATE_BLOCK)
        coded[scale], coded[LEVELS[key]] = statistics.absmax, levels
    return coded
