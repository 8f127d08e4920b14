"""The tensors that adapted layers keep for the backward pass, and the work that they leave undone in it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapter_models import adapted, perturb, tokens, wrapped
from torch import Tensor, nn

from lightning_peft.adapters.dora import DoRALinear
from lightning_peft.adapters.lora import LoRALinear
from lightning_peft.adapters.lora_fa import LoRAFALinear


def frozen_layer(kind: type[LoRALinear], **options: Any) -> LoRALinear:
    torch.manual_seed(0)
    layer = wrapped(kind, nn.Linear(64, 24).requires_grad_(False), rank=4, alpha=8.0, **options)
    nn.init.normal_(layer.lora_B.weight)
    return layer


def kept(run: Callable[[], Tensor]) -> list[Tensor]:
    """Return what `run` keeps for the backward pass."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run()
    return saved


def activation_bytes(**options: Any) -> int:
    """Return the bytes of distinct storages, weights aside, that the adapted model keeps."""
    model = adapted("lora", **options).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = kept(lambda: model.model(input_ids=tokens(), use_cache=False).last_hidden_state)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    return sum(size for pointer, size in sizes.items() if pointer not in weights)


def test_dropout_is_drawn_again_not_kept() -> None:
    assert activation_bytes(dropout=0.5) == activation_bytes(dropout=0.0)


@pytest.mark.parametrize("kind", [LoRALinear, LoRAFALinear])
def test_dropout_has_torchs_gradients_and_leaves_its_generator(kind: type[LoRALinear]) -> None:
    layer = frozen_layer(kind, dropout=0.3).train()
    x = torch.randn(3, 5, 64, requires_grad=True)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.3)
    drawn_next = torch.rand(4)
    low_rank = dropped @ layer.lora_A.weight.t() @ layer.lora_B.weight.t()
    expected = torch.autograd.grad((layer.base_layer(x) + 2.0 * low_rank).square().sum(), wanted)

    torch.manual_seed(3)
    actual = torch.autograd.grad(layer(x).square().sum(), wanted)

    # fp32 sums in another order.
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(torch.rand(4), drawn_next)


def test_query_key_and_value_keep_one_input() -> None:
    model = perturb(adapted("lora")).train()
    attention = model.model.layers[0].self_attn
    x = torch.randn(2, 12, 64, requires_grad=True)

    saved = kept(lambda: torch.cat([p(x) for p in (attention.q_proj, attention.k_proj, attention.v_proj)], -1))

    inputs = [t for t in saved if t.shape == x.shape]
    assert len(inputs) == 3 and {t.untyped_storage().data_ptr() for t in inputs} == {x.untyped_storage().data_ptr()}


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_no_activation_is_kept_in_fp32_on_a_bf16_base(kind: type[LoRALinear]) -> None:
    layer = frozen_layer(kind)
    layer.base_layer.to(torch.bfloat16)
    x = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)

    saved = kept(lambda: layer(x))

    assert not [t for t in saved if t.shape[0] == 3 and t.dtype == torch.float32]


def products_with_weight(layer: LoRALinear, x: Tensor) -> int:
    """Return how often the backward pass multiplies with the frozen weight, or would make a gradient for it."""
    output = layer(x).sum()
    with torch.profiler.profile(record_shapes=True) as recorded:
        output.backward()
    assert layer.base_layer.weight.grad is None
    return sum(event.name == "aten::mm" and [24, 64] in event.input_shapes for event in recorded.events())


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # torch 2.11
@pytest.mark.parametrize("kind", [LoRALinear, LoRAFALinear, DoRALinear])
def test_a_frozen_input_costs_no_product_with_the_weight(kind: type[LoRALinear]) -> None:
    """The first block is such a case, whose input comes from frozen embeddings."""
    layer = frozen_layer(kind)

    assert products_with_weight(layer, torch.randn(3, 64)) == 0
    assert products_with_weight(layer, torch.randn(3, 64, requires_grad=True)) == 1
