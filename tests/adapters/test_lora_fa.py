"""LoRA-FA: only B trains, with its plain gradient or the one nearest to full fine-tuning's."""

import pytest
import torch
from adapter_models import adapted, llama, logits, perturb, wrapped
from torch import nn

from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.adapters.lora_fa import LoRAFAConfig, LoRAFALinear


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_corrected_step_is_the_full_gradient_in_the_rows_of_A(rank_stabilized: bool) -> None:
    torch.manual_seed(0)
    layer = wrapped(LoRAFALinear, nn.Linear(24, 16), 4, 10.0, rank_stabilized=rank_stabilized, gradient_correction=True)
    nn.init.normal_(layer.lora_B.weight)
    x, direction = torch.randn(7, 24), torch.randn(7, 16)

    (layer(x) * direction).sum().backward()

    A = layer.lora_A.weight
    full_gradient = direction.t() @ x  # this is W's in y = W x
    projected = full_gradient @ torch.linalg.pinv(A) @ A
    step = layer.scaling * layer.lora_B.weight.grad @ A
    torch.testing.assert_close(step, projected, atol=1e-4, rtol=1e-4)


def test_correction_changes_gradients_only() -> None:
    corrected = perturb(adapted("lora_fa", gradient_correction=True))

    assert torch.equal(logits(corrected), logits(perturb(adapted("lora_fa"))))


def test_correction_needs_a_rank_within_the_inputs() -> None:
    with pytest.raises(ValueError, match="gradient_correction=true adapter.rank=65: A A.T has no inverse above the 64"):
        inject_adapters(llama(), LoRAFAConfig(rank=65, gradient_correction=True))
