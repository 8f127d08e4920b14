from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, small_model
from torch import Tensor
from transformers import PreTrainedModel

from lightning_peft.kernels.attention.grouping import find_samples
from lightning_peft.models import attention
from lightning_peft.models.attention import (
    MASKED_TYPES,
    VARLEN_TYPES,
    accept_packed_batches,
    choose_attention,
    supports_packing,
    varlen_attention,
)
from lightning_peft.models.source import VARLEN

LENGTHS = [[7, 13, 12], [20, 12]]
"""Samples of two packed rows; longer than the sliding window of 5."""


def packed_inputs() -> dict[str, Tensor | int | bool]:
    input_ids = torch.randint(3, 96, (2, 32), generator=torch.Generator().manual_seed(1))
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    cu_seqlens = torch.tensor([0, *sum(LENGTHS, [])]).cumsum(0).to(torch.int32)
    return {
        "input_ids": input_ids, "position_ids": position_ids, "use_cache": False, "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens, "max_length_q": 20, "max_length_k": 20,
    }  # fmt: skip


def separate_logits(model: PreTrainedModel) -> Tensor:
    """Return the logits of each sample on its own, transformers' way, laid out as the packed rows."""
    rows = packed_inputs()["input_ids"]
    return torch.stack(
        [
            torch.cat([model(input_ids=sample[None], use_cache=False).logits[0] for sample in row.split(lengths)])
            for row, lengths in zip(rows, LENGTHS, strict=True)
        ]
    )


def packing_model(model_type: str) -> PreTrainedModel:
    model = small_model(model_type)
    accept_packed_batches(model)
    if (attention := choose_attention(model.config, "auto")) is not None:
        model.set_attn_implementation(attention)
    return model


def assert_packed_equals_separate(model_type: str) -> None:
    expected = separate_logits(small_model(model_type))
    model = packing_model(model_type)
    assert supports_packing(model)
    logits = model(**packed_inputs()).logits
    # fp32 sums in another order; scaled, as some families have large logits.
    torch.testing.assert_close(logits / expected.abs().max(), expected / expected.abs().max(), atol=3e-6, rtol=0)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_packed_equals_separate_logits(model_type: str) -> None:
    assert_packed_equals_separate(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted((VARLEN_TYPES | MASKED_TYPES) - set(FAMILIES)))
def test_every_listed_type_packs(model_type: str) -> None:
    assert_packed_equals_separate(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(MASKED_TYPES - {"gemma2"}))
def test_every_masked_type_packs_under_sdpa(model_type: str) -> None:
    model = small_model(model_type)
    expected = separate_logits(model)
    accept_packed_batches(model)
    assert model.config._attn_implementation == "sdpa" and supports_packing(model)
    logits = model(**packed_inputs()).logits
    torch.testing.assert_close(logits / expected.abs().max(), expected / expected.abs().max(), atol=3e-6, rtol=0)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_packed_equals_separate_gradients(model_type: str) -> None:
    plain, packed = small_model(model_type), packing_model(model_type)
    weights = torch.randn(2, 32, 96, generator=torch.Generator().manual_seed(2))
    (separate_logits(plain) * weights).mean().backward()
    (packed(**packed_inputs()).logits * weights).mean().backward()
    for expected, actual in zip(plain.parameters(), packed.parameters(), strict=True):
        scale = expected.grad.abs().max()
        # Rounding only: the sums over tokens run in another order.
        torch.testing.assert_close(actual.grad / scale, expected.grad / scale, atol=1e-5, rtol=0)


def test_packed_call_builds_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: masks.append(a) or original(*a, **k))
    model = packing_model("llama")
    seen = []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"].numel()), with_kwargs=True
    )
    model(**packed_inputs())
    assert seen == [0] and masks == []


def test_left_padded_generation_equals_sdpa() -> None:
    plain, model = small_model("llama"), packing_model("llama")
    assert model.config._attn_implementation == VARLEN
    input_ids = torch.randint(3, 96, (2, 9))
    mask = torch.ones_like(input_ids)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(input_ids, **options), plain.generate(input_ids, **options))


def test_packing_is_refused_where_samples_would_mix() -> None:
    model = small_model("llama")
    model.config.model_type = "unlisted"
    accept_packed_batches(model)
    assert not supports_packing(model)
    with pytest.raises(RuntimeError, match="data.packing=false"):
        model(**packed_inputs())


def test_one_sample_a_row_needs_no_support() -> None:
    model = small_model("llama")
    inputs = packed_inputs() | {
        "position_ids": torch.arange(32).expand(2, -1),
        "cu_seq_lens_q": torch.tensor([0, 32, 64], dtype=torch.int32),
    }
    expected = model(**inputs).logits
    model.config.model_type = "unlisted"
    accept_packed_batches(model)
    assert torch.equal(model(**inputs).logits, expected)


def test_softcapped_attention_is_left_to_transformers() -> None:
    assert choose_attention(small_model("gemma2").config, "auto") is None
    with pytest.raises(ValueError, match="model.attention=varlen: not for models of type gemma2"):
        choose_attention(small_model("gemma2").config, "varlen")


def test_named_attention_is_passed_on() -> None:
    assert choose_attention(small_model("llama").config, "eager") == "eager"


def reference(q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None) -> Tensor:
    """Return the softmax attention of one sample, written out; (H, T, D)."""
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
    hidden = (distance < 0) | (distance >= (window or 10**9))
    return ((q @ k.mT) * scaling).masked_fill(hidden, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("dropout", [0.0, 1e-9], ids=["flash", "loop"])
@pytest.mark.parametrize("window", [None, 4])
def test_varlen_attention_equals_formula(window: int | None, dropout: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 6, 10, 8), (2, 2, 10, 8), (2, 2, 10, 8)]
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).float().requires_grad_() for s in shapes)
    cu_seqlens = torch.tensor([0, 3, 10, 20], dtype=torch.int32)
    output = varlen_attention(q, k, v, cu_seqlens, 10, 0.3, dropout, window)
    parts = [(0, 0, 3), (0, 3, 10), (1, 0, 10)]
    expected = torch.cat([reference(*(x[r, :, a:b] for x in (q, k, v)), 0.3, window) for r, a, b in parts], 1)
    actual = output.flatten(0, 1).transpose(0, 1)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
    weights = torch.randn(expected.shape, generator=generator)
    gradients = torch.autograd.grad((actual * weights).sum(), (q, k, v))
    for mine, theirs in zip(gradients, torch.autograd.grad((expected * weights).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_bf16_is_computed_in_fp32_or_natively_and_stored_in_bf16() -> None:
    q, k, v = (torch.randn(1, heads, 16, 8, dtype=torch.bfloat16) for heads in (4, 2, 2))
    output = varlen_attention(q, k, v, torch.tensor([0, 16], dtype=torch.int32), 16, 0.35)
    assert output.dtype == torch.bfloat16 and output.shape == (1, 16, 4, 8)
    expected = reference(*(x[0].float() for x in (q, k, v)), 0.35, None).transpose(0, 1)
    # bf16 keeps 8 bits: the output is rounded once, values are below 4.
    torch.testing.assert_close(output[0].float(), expected, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("bounds", [[0, 5, 15, 20], [0, 12, 20], [1, 10, 20], [0, 10, 10, 20], [0, 10]])
def test_wrong_cu_seqlens_is_refused(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens"):
        find_samples(torch.tensor(bounds), rows=2, width=10)


def test_checkpointed_blocks_give_equal_gradients() -> None:
    plain, checkpointed = packing_model("llama"), packing_model("llama")
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # 5.23 has one, 5.17 the other
    next(getattr(checkpointed, name) for name in names if hasattr(checkpointed, name))()
    for model in (plain, checkpointed):
        model.train()
        model(**packed_inputs()).logits.square().mean().backward()
    for expected, actual in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(actual.grad, expected.grad)


def test_compiled_block_is_one_graph_and_gives_equal_gradients() -> None:
    plain, compiled = packing_model("llama"), packing_model("llama")
    for layer in compiled.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    outputs = [model(**packed_inputs()).logits for model in (plain, compiled)]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    for output in outputs:
        output.square().mean().backward()
    for expected, actual in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("major", "dtype", "width", "value_width", "takes"),
    [
        (9, torch.bfloat16, 128, 128, True), (8, torch.float16, 256, 256, True), (7, torch.float16, 64, 64, False),
        (9, torch.float32, 64, 64, False), (9, torch.bfloat16, 257, 257, False), (9, torch.bfloat16, 512, 512, False),
        (9, torch.bfloat16, 100, 100, False), (9, torch.bfloat16, 192, 128, False),
    ],
)  # fmt: skip
def test_flash_kernel_is_asked_for_heads_it_takes(monkeypatch, major, dtype, width, value_width, takes):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    query, value = torch.empty(1, 2, 4, width, dtype=dtype), torch.empty(1, 2, 4, value_width, dtype=dtype)
    assert attention._has_flash_attention(query, value) is takes
