"""Stored bytes against formulas and against real modules and optimisers."""

import math

import pytest
import torch
from empty_models import TINY, config_folder, empty

from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.compose import compose_config
from lightning_peft.estimation.model_states import (
    ADAPTERS,
    BASE,
    EMBEDDINGS,
    SCALES,
    gathered_weights,
    loaded_weights,
    optimizer_states,
    stored_weights,
)
from lightning_peft.estimation.recorder import Held, held_bytes
from lightning_peft.models.loading import load_model
from lightning_peft.optim.optimizers import build_optimizer, optimizer_state_bytes
from lightning_peft.quantization.quantize import memory_by_group

D, F, V, KV, LAYERS, R = 64, 128, 320, 32, 2, 16
LINEARS = LAYERS * (2 * D * D + 2 * KV * D + 3 * F * D)


def component(held: Held, name: str) -> int:
    return held_bytes(Held({key: count for key, count in held.items() if key[0] == name}))


def test_dense_bytes_follow_the_formula():
    held = stored_weights(empty("rank=r16").model)
    norms_and_frequencies = (2 * LAYERS + 1) * D + D // 4 // 2
    adapters = LAYERS * R * (2 * (D + D) + 2 * (D + KV) + 3 * (D + F))
    assert component(held, EMBEDDINGS) == 4 * 2 * V * D
    assert component(held, ADAPTERS) == 4 * adapters
    assert component(held, BASE) == 4 * (LINEARS + norms_and_frequencies) + 4 * (D // 4 // 2)
    assert component(held, SCALES) == 0


@pytest.mark.parametrize("double", [True, False])
def test_quantisation_scales_follow_the_formula(double):
    held = stored_weights(empty("quantization=nf4", f"quantization.double_quantization={double}").model)
    shapes = [(D, D), (D, D), (KV, D), (KV, D), (F, D), (F, D), (D, F)] * LAYERS
    blocks = [rows * columns // 64 for rows, columns in shapes]
    expected = sum(n + 4 * math.ceil(n / 256) + 4 for n in blocks) if double else sum(4 * n for n in blocks)
    assert component(held, SCALES) == expected


@pytest.mark.parametrize("method", ["lora", "qlora", "qdora", "vera", "full", "intrinsic", "ia3"])
@pytest.mark.parametrize("name", ["tiny", "tiny_tied"])
def test_bytes_are_those_of_the_real_model(method, name):
    overrides = [*TINY, f"method={method}", f"model.name={name}"]
    config = compose_config("train", overrides)
    real = load_model(config.model, torch.float32, config.quantization)
    inject_adapters(real, config.adapter)
    assert held_bytes(stored_weights(empty(*overrides).model)) == sum(memory_by_group(real).values())


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_optimizer_bytes_are_those_of_a_real_step(name):
    config = compose_config("train", [*TINY, "rank=r64", f"optimizer={name}"])
    parameters = {"a": torch.nn.Parameter(torch.ones(64, 65)), "b": torch.nn.Parameter(torch.ones(7))}
    optimizer = build_optimizer(parameters.items(), config.optimizer)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    # Beside the states there are a step count and, shared by all 8-bit states, the levels of their codes.
    names = ("exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2")
    real = sum(state[key].nbytes for state in optimizer.state.values() for key in names if key in state)
    held, paged = optimizer_states(parameters.values(), name, shards=1, pages=False)
    assert (held_bytes(held), paged) == (real, 0)


def test_paged_states_are_those_the_optimizer_reports():
    tensors = [torch.empty(400, 300, device="meta"), torch.empty(300, 300, device="meta")]
    for name in ("paged_adamw_8bit", "paged_adamw_32bit"):
        held, paged = optimizer_states(tensors, name, shards=1, pages=True)
        assert (paged, held_bytes(held)) == optimizer_state_bytes([120_000, 90_000], name)


def test_shards_of_fsdp_are_rows():
    model = empty("rank=r16").model
    whole, half = (sum(p.numel() for p in model.parameters()), held_bytes(stored_weights(model, 2)))
    buffers = sum(b.nbytes for b in model.buffers())
    assert half == 4 * whole // 2 + buffers  # every tensor of the tiny model has an even number of rows


def test_fsdp_reads_the_last_block_beside_slices_of_the_others(tmp_path):
    model = empty("rank=r16", "model=hf", f"model.path={config_folder(tmp_path, num_hidden_layers=12)}").model
    block = sum(p.nbytes for p in model.model.layers[0].parameters())  # all tensors have a multiple of four rows
    assert held_bytes(stored_weights(model)) - held_bytes(loaded_weights(model, 4)) == 11 * block * 3 // 4


def test_fsdp_gathers_root_and_one_block_twice():
    model = empty("rank=r16").model
    block = sum(p.nbytes for p in model.model.layers[0].parameters())
    everything = sum(p.nbytes for p in model.parameters())
    assert held_bytes(gathered_weights(model)) == everything - LAYERS * block + 2 * block
