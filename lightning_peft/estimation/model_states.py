"""The bytes that a model and its optimiser store, by component: exact, read from the modules and never from values."""

import math
from collections import Counter
from collections.abc import Container, Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.inject import SHARED
from lightning_peft.adapters.shared_input import input_groups
from lightning_peft.adapters.wide_weights import room_of
from lightning_peft.estimation.recorder import Array, Held, held_bytes
from lightning_peft.estimation.trace import WORKSPACE
from lightning_peft.models.blocks import transformer_blocks
from lightning_peft.optim.optimizers import MIN_8BIT_ELEMENTS, MIN_PAGED_ELEMENTS, OPTIMIZERS, STATE_BLOCK
from lightning_peft.quantization.linear import CodedWeight
from lightning_peft.quantization.weights import dense_dtype

BASE, SCALES, EMBEDDINGS, ADAPTERS = "base", "quantisation scales", "embeddings", "adapters"
OPTIMIZER, IMPORTANCE, GATHERED = "optimiser states", "importance scores", "gathered weights"


def array_of(tensor: Tensor) -> Array:
    return Array(tuple(tensor.shape), tensor.dtype)


def stored_weights(model: PreTrainedModel, shards: int = 1, whole: Container[int] = (), buffers: bool = True) -> Held:
    """Return every parameter and buffer of the model on one of so many ranks that share it; a tied tensor counts once.

    `whole` are ids of parameters that are not sharded yet; without `buffers` only parameters are counted.

    base: the frozen part with norms and rotary tables, or every weight where all train; embeddings: the output head
    too; adapters: everything they hold, frozen factors included.
    """
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    adapted = {id(t) for part in adapter_parts(model) for t in tensors_of(part)}
    adapted -= {id(t) for m in model.modules() if isinstance(m, Adapter) for t in tensors_of(m.base_layer)}
    held: Held = Counter()
    seen: set[int] = set()
    for module in model.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if id(tensor) in seen or not (buffers or isinstance(tensor, nn.Parameter)):
                continue
            seen.add(id(tensor))
            if id(tensor) in adapted:
                component = ADAPTERS
            elif isinstance(module, CodedWeight) and name.startswith("absmax"):
                component = SCALES
            else:
                component = EMBEDDINGS if module in ends else BASE
            is_sharded = isinstance(tensor, nn.Parameter) and id(tensor) not in whole
            held[(component, shard(array_of(tensor), shards if is_sharded else 1))] += 1
    return held


def loaded_weights(model: PreTrainedModel, shards: int) -> Held:
    """Return what a rank holds when the last block is filled, and neither it nor the root group is sharded yet."""
    sharded = {id(p) for block in transformer_blocks(model)[:-1] for p in block.parameters()}
    return stored_weights(model, shards, {id(p) for p in model.parameters()} - sharded)


def adapter_parts(model: nn.Module) -> list[nn.Module]:
    parts: list[nn.Module] = [module for module in model.modules() if isinstance(module, Adapter)]
    shared = getattr(model, SHARED, None)
    return [*parts, shared] if isinstance(shared, nn.Module) else parts


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def shard(array: Array, shards: int) -> Array:
    """Return the largest slice of a tensor that FSDP2 cuts along its rows."""
    if shards == 1 or not array.shape:
        return array
    return Array((math.ceil(array.shape[0] / shards), *array.shape[1:]), array.dtype)


def optimizer_states(trained: Iterable[Tensor], name: str, shards: int, pages: bool) -> tuple[Held, int]:
    """Return what the optimiser keeps on the device, and with `pages` the bytes that live in host memory instead."""
    choice = OPTIMIZERS[name]
    held: Held = Counter()
    paged = 0
    for tensor in trained:
        array = shard(array_of(tensor), shards)
        size = torch.Size(array.shape).numel()
        is_8bit = choice.state_bits == 8 and size >= MIN_8BIT_ELEMENTS
        state = Array(array.shape, torch.uint8 if is_8bit else torch.float32)
        if is_8bit:
            held[(OPTIMIZER, Array((math.ceil(size / STATE_BLOCK),), torch.float32))] += 2
        if pages and choice.is_paged and size >= MIN_PAGED_ELEMENTS:
            paged += 2 * state.nbytes
        else:
            held[(OPTIMIZER, state)] += 2
    return held, paged


def factor_copies(model: PreTrainedModel) -> Held:
    """Count the factors in the dtype of the products, which a CUDA run keeps where each rank has whole ones.

    At the edges of weights, where a compiled run has them, the whole edges count.
    """
    held: Held = Counter()
    for group in input_groups(model):
        dtype = dense_dtype(group.layers[0].base_layer)
        if dtype.itemsize != 2:
            continue
        room = None if group.takes_wide_input is None else room_of(group.layers)
        for place, layer in enumerate(group.layers):
            A, B = layer.factors()
            below = room is not None and room.place == place
            edges = room.rows * A.shape[1] if room is not None and below else 0
            if room is not None and group.takes_wide_input:
                has_corner = below and not isinstance(layer.base_layer, CodedWeight)
                edges += room.columns * (len(B) + (room.rows if has_corner else 0))
            else:
                held[(ADAPTERS, Array(tuple(B.shape), dtype))] += 1
            if edges:
                held[(ADAPTERS, Array((edges,), dtype))] += 1
            if room is None:
                held[(ADAPTERS, Array(tuple(A.shape), dtype))] += 1
    return held


def importance_scores(model: PreTrainedModel) -> Held:
    """Count what the method's schedule remembers of the weights."""
    layers = (module for module in model.modules() if isinstance(module, Adapter))
    return Counter((IMPORTANCE, array_of(tensor)) for layer in layers for tensor in layer.schedule_state())


def optimizer_scratch(trained: Iterable[Tensor], name: str, shards: int, accelerator: str) -> Held:
    """Return what a step of the optimiser needs for a moment: bitsandbytes on a CPU computes in fp32 copies."""
    if OPTIMIZERS[name].state_bits != 8 or accelerator != "cpu":
        return Counter()
    largest = max((shard(array_of(t), shards) for t in trained), key=lambda array: array.nbytes)
    # A step needs both states, the scaled gradient and two steps of the denominator.
    return Counter({(WORKSPACE, largest): 5})


def gathered_weights(model: PreTrainedModel) -> Held:
    """Return what an FSDP2 rank holds beyond its slices: the root group, gathered through the whole step, and the
    largest block, gathered once for the computation and once as it came from the other ranks."""
    blocks = transformer_blocks(model)
    inside = {id(p) for block in blocks for p in block.parameters()}
    root = Counter((GATHERED, array_of(p)) for p in model.parameters() if id(p) not in inside)
    groups = [Counter((GATHERED, array_of(p)) for p in block.parameters()) for block in blocks]
    largest = max(groups, key=held_bytes)
    return root + largest + largest


def whole_weights(trained: Iterable[Tensor]) -> Held:
    """Return the most that rank zero gathers to save: everything trained so far, and twice the one on its way."""
    held: Held = Counter()
    most = held
    for tensor in trained:
        key = (GATHERED, array_of(tensor))
        held[key] += 1
        most = max(most, held + Counter([key]), key=held_bytes)
    return most


def loading_scratch(model: PreTrainedModel) -> Held:
    """Return the need of reading the largest weight beside the finished model: its dense form, and its codes twice.

    Dense weights are read into the memory they stay in.
    """
    coded = [module for module in model.modules() if isinstance(module, CodedWeight)]
    if not coded:
        return Counter()
    layer = max(coded, key=lambda layer: math.prod(layer.shape))
    # A stack is made of the tensors of single experts, which lie beside it until it is whole.
    dense = 2 if len(layer.shape) == 3 else 1
    return Counter({(WORKSPACE, Array(layer.shape, layer.dtype)): dense, (WORKSPACE, array_of(layer.weight)): 1})
