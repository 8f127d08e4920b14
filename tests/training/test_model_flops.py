"""The parts of MFU: linear weights, attention, experts that a token goes to, and the device's own peak."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.adapters.registry import METHODS
from lightning_peft.data.batch import Batch
from lightning_peft.quantization.config import Kind, QuantizationConfig
from lightning_peft.quantization.quantize import quantize_linears
from lightning_peft.training.model_flops import (
    attention_flops,
    linear_flops_per_token,
    peak_flops,
    squared_lengths,
    why_slow,
)

WIDTH, INNER, WORDS, LAYERS = 64, 128, 100, 3
LINEAR = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER) + WORDS * WIDTH
SIZES = dict(
    hidden_size=WIDTH, intermediate_size=INNER, vocab_size=WORDS, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=4,
)  # fmt: skip


def llama(tied: bool = False) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).requires_grad_(False)


@pytest.mark.parametrize("tied", [False, True])
def test_frozen_weights_multiply_twice_and_embeddings_never(tied):
    assert linear_flops_per_token(llama(tied)) == 4 * LINEAR


@pytest.mark.parametrize("kind", [None, Kind.nf4, Kind.int8])
def test_trained_factors_multiply_three_times(kind):
    model = llama()
    if kind is Kind.nf4:
        quantize_linears(model, QuantizationConfig(kind=kind))
    if kind is Kind.int8:
        quantize_linears(model, QuantizationConfig(kind=kind, block_size=64, double_quantization=False))
    inject_adapters(model, METHODS["lora"].config(method="lora", rank=4))
    factors = LAYERS * 4 * (4 * 2 * WIDTH + 3 * (WIDTH + INNER))
    assert linear_flops_per_token(model) == 4 * LINEAR + 6 * factors


def test_of_experts_those_count_that_a_token_is_sent_to():
    config = Qwen3MoeConfig(
        **SIZES, head_dim=16, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1
    )
    model = Qwen3MoeForCausalLM(config).requires_grad_(False)
    linear = LAYERS * (4 * WIDTH * WIDTH + 8 * WIDTH + 2 * 3 * WIDTH * 32) + WORDS * WIDTH
    assert linear_flops_per_token(model) == 4 * linear


def test_attention_grows_with_the_square_of_each_sample():
    lengths = torch.tensor([0, 5, 8, 16], dtype=torch.int32)
    ids = torch.zeros(1, 16, dtype=torch.int64)
    batch = Batch(ids, ids, ids, lengths, 8, 16, 16)
    assert squared_lengths(batch).item() == 25 + 9 + 64
    # Scores and sums over half a square, two operations each, and twice as much backward.
    assert attention_flops(llama()) == LAYERS * 3 * 2 * (2 * WIDTH / 2)


def test_device_is_known_by_the_longest_part_of_its_name():
    peaks = {
        "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12, "NVIDIA L4": 121e12,
        "NVIDIA L40S": 362e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A10": 125e12, "NVIDIA H200": 989e12,
        "Tesla K80": None,
    }  # fmt: skip
    assert {name: peak_flops(name) for name in peaks} == peaks


@pytest.mark.parametrize(
    ("utilization", "tokens", "precision", "recomputes", "says"),
    [
        (0.2, 100, "32-true", True, None),
        (
            0.08,
            100,
            "32-true",
            True,
            "the GPU did 8% of what its bf16 peak allows; trainer.precision=32-true",
        ),
        (0.08, 610, "bf16-true", True, "a micro batch has 610 tokens, too few to keep it busy"),
        (0.08, 8000, "bf16-true", True, "activation_checkpointing=none where the memory allows it"),
        (0.08, 8000, "bf16-mixed", False, "the options do not tell why"),
    ],
)
def test_gpu_that_was_used_little_has_its_likeliest_reason(utilization, tokens, precision, recomputes, says):
    said = why_slow(utilization, tokens, precision, recomputes, accumulates=False)
    assert said is None if says is None else says in said
