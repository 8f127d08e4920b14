"""The chunked loss against the plain one: all logits, torch's cross entropy, autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.objectives import linear_cross_entropy as module
from lightning_peft.objectives.linear_cross_entropy import (
    LOGIT_BYTES,
    MIN_CHUNK,
    chunk_tokens,
    chunks_as_on,
    linear_cross_entropy,
)


def problem(dtype=torch.float64, tokens=37, width=16, vocabulary=50):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocabulary, (tokens,))
    head = nn.Linear(width, vocabulary, dtype=dtype)
    return hidden, labels, head


def plain_loss(hidden, labels, head, transform=lambda logits: logits):
    return F.cross_entropy(transform(head(hidden).float()), labels, reduction="sum")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "chunk_tokens", lambda vocabulary, device: 8)


@pytest.mark.parametrize("bias", [True, False])
def test_frozen_head_loss_and_gradient_equal_plain(bias):
    hidden, labels, head = problem()
    head.requires_grad_(False)
    head.bias = head.bias if bias else None
    ours = linear_cross_entropy(hidden, labels, head, 50)
    (gradient,) = torch.autograd.grad(3.0 * ours, hidden)
    expected = plain_loss(hidden, labels, head)
    (expected_gradient,) = torch.autograd.grad(3.0 * expected, hidden)
    # Logits are fp32 inside, so agreement is to fp32 resolution.
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


def test_fp32_hidden_states_meet_a_bf16_head_under_autocast():
    """CUDA's autocast runs layer norms in fp32, also before a half-precision head."""
    hidden, labels, head = problem(torch.float32)
    head.to(torch.bfloat16).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(hidden, labels, head, 50)
        expected = plain_loss(hidden, labels, head)
    (gradient,) = torch.autograd.grad(ours, hidden)
    (expected_gradient,) = torch.autograd.grad(expected, hidden)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=2**-6, atol=2**-8)


def test_trained_head_gets_its_gradient():
    hidden, labels, head = problem(torch.float32)
    ours = torch.autograd.grad(linear_cross_entropy(hidden, labels, head, 50), [hidden, head.weight, head.bias])
    expected = torch.autograd.grad(plain_loss(hidden, labels, head), [hidden, head.weight, head.bias])
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [True, False])
def test_softcap_is_differentiated(frozen, dtype):
    def softcap(logits):
        return 2.0 * torch.tanh(logits / 2.0)

    hidden, labels, head = problem(dtype)
    head.requires_grad_(not frozen)
    (ours,) = torch.autograd.grad(linear_cross_entropy(hidden, labels, head, 50, softcap), hidden)
    (expected,) = torch.autograd.grad(plain_loss(hidden, labels, head, softcap), hidden)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 2**-6, "atol": 2**-8}
    torch.testing.assert_close(ours, expected, **tolerance)


def test_trained_bias_of_a_frozen_head_gets_its_gradient():
    hidden, labels, head = problem(torch.float32)
    head.weight.requires_grad_(False)
    ours = torch.autograd.grad(linear_cross_entropy(hidden, labels, head, 50), [hidden, head.bias])
    expected = torch.autograd.grad(plain_loss(hidden, labels, head), [hidden, head.bias])
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_chunks_shrink_with_the_vocabulary():
    for vocabulary in (320, 16_000, 32_000):
        assert chunk_tokens(vocabulary) % 64 == 0
        assert LOGIT_BYTES["cpu"] / 2 < 4 * vocabulary * chunk_tokens(vocabulary) <= LOGIT_BYTES["cpu"]
    assert chunk_tokens(128_256, "cuda") == 2048
    with chunks_as_on("cuda"):
        assert chunk_tokens(128_256) == 2048
    assert chunk_tokens(49_152) == chunk_tokens(10_000_000) == MIN_CHUNK


def test_no_tokens_give_zero_loss_and_zero_gradient():
    hidden, labels, head = problem(torch.float32)
    loss = linear_cross_entropy(hidden[:0], labels[:0], head.requires_grad_(False), 50)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert loss.item() == 0 and not gradient.any()


def test_certain_prediction_keeps_its_small_gradient_in_bf16():
    # p of the label is 0.999: softmax minus onehot is -0.001, which bf16 would round to 0 or -0.004.
    hidden = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    head = nn.Linear(2, 2, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    head.weight.data = torch.tensor([[6.90625, 0.0], [0.0, 0.0]], dtype=torch.bfloat16)
    (gradient,) = torch.autograd.grad(linear_cross_entropy(hidden, torch.tensor([0]), head, 2), hidden)
    expected = (torch.sigmoid(torch.tensor(6.90625)) - 1) * 6.90625
    torch.testing.assert_close(gradient[0, 0].float(), expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("trained", [False, True])
def test_weights_multiply_each_tokens_loss_and_gradient(trained):
    hidden, labels, head = problem(torch.float32)
    head.requires_grad_(trained)
    weights = torch.linspace(0.0, 2.0, len(labels))
    ours = linear_cross_entropy(hidden, labels, head, 50, weights=weights)
    expected = (F.cross_entropy(head(hidden), labels, reduction="none") * weights).sum()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)  # fp32 sums in another order
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, hidden)[0] for loss in (ours, expected)), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("trained", [False, True])
def test_each_tokens_loss_has_a_gradient_of_its_own(trained):
    hidden, labels, head = problem(torch.float32)
    head.requires_grad_(trained)
    scales = torch.linspace(-3.0, 2.0, len(labels))
    ours = module.linear_token_losses(hidden, labels, head, 50)
    expected = F.cross_entropy(head(hidden), labels, reduction="none")
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    # A nonlinear function of the losses, as of the log-probability of a sample.
    gradients = [torch.autograd.grad((losses.sigmoid() * scales).sum(), hidden)[0] for losses in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def trained_head(bias=False):
    """Return a head that trains in fp32 beside bf16 activations, as the injector makes it."""
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(64, 97, bias=bias)}).to(torch.bfloat16)
    inject_adapters(model, LoRAConfig(target_modules=["body"], trainable_modules=["head"]))
    return model["head"]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("bias", [False, True])
def test_head_trained_in_fp32_takes_its_products_in_the_activations_dtype(bias, smoothing):
    torch.manual_seed(0)
    head, weights = trained_head(bias), torch.rand(60)
    hidden, labels = torch.randn(60, 64, dtype=torch.bfloat16, requires_grad=True), torch.randint(0, 97, (60,))
    wanted = [hidden, *head.parameters()]
    loss = module.linear_token_losses(hidden, labels, head, 97, None, smoothing) @ weights
    gradients = torch.autograd.grad(loss, wanted)
    expected = (
        F.cross_entropy(
            F.linear(hidden.float(), *head.parameters()), labels, reduction="none", label_smoothing=smoothing
        )
        @ weights
    )
    # bf16 keeps eight bits of weights, of logits and of their gradients.
    torch.testing.assert_close(loss, expected, rtol=0.01, atol=0)
    for found, plain in zip(gradients, torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(found, plain, rtol=0.03, atol=0.02 * float(plain.abs().max()))
    assert all(gradient.dtype == torch.float32 for gradient in gradients[1:])


def test_head_with_a_hook_of_its_own_is_called():
    head, seen = trained_head(), []
    head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    hidden = torch.randn(8, 64, dtype=torch.bfloat16, requires_grad=True)
    linear_cross_entropy(hidden, torch.arange(8), head, 97).backward()
    assert seen


@pytest.mark.parametrize("softcap", [None, lambda logits: 2.0 * torch.tanh(logits / 2.0)])
@pytest.mark.parametrize("trained", [False, True])
def test_smoothed_loss_and_gradient_are_torchs(trained, softcap):
    hidden, labels, head = problem(torch.float32)
    head.requires_grad_(trained)
    scales = torch.linspace(-3.0, 2.0, len(labels))
    ours = module.linear_token_losses(hidden, labels, head, 50, softcap, 0.1)
    logits = head(hidden) if softcap is None else softcap(head(hidden))
    expected = F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(losses @ scales, hidden)[0] for losses in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        kept = module.linear_token_losses(hidden, labels, head, 50, softcap, 0.1)
    torch.testing.assert_close(kept, expected, rtol=1e-5, atol=1e-5)


def test_smoothed_loss_of_a_frozen_bf16_head_is_torchs_but_for_rounding():
    hidden, labels, head = problem(torch.bfloat16, vocabulary=64)
    head.requires_grad_(False)
    ours = module.linear_token_losses(hidden, labels, head, 64, None, 0.2)
    expected = F.cross_entropy(head(hidden).float(), labels, reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(losses.sum(), hidden)[0] for losses in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=2**-6, atol=2**-8)
