"""The kernel's cross entropy and gradient against the formula in fp64."""

import pytest
import torch
import torch.nn.functional as F

from lightning_peft.kernels import cross_entropy
from lightning_peft.kernels.native.library import library


@pytest.fixture(autouse=True)
def kernel() -> None:
    if library() is None:
        pytest.skip("no processor with AVX-512 and bf16, or no compiler")


@pytest.mark.parametrize("spread", [0.1, 3.0, 60.0])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 16), (7, 48), (33, 2000)])
def test_loss_is_fp32_and_the_gradient_is_rounded_once(rows: int, vocabulary: int, spread: float) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(rows, vocabulary) * spread).bfloat16()
    labels = torch.randint(0, vocabulary, (rows,))
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none")
    expected.sum().backward()
    losses = torch.ops.lightning_peft.cross_entropy_gradient_(logits, labels)
    # fp32 sums of a row, and normalisers of up to 240.
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-6, atol=3e-5)
    assert exact.grad is not None
    torch.testing.assert_close(logits.double(), exact.grad, rtol=2**-8 + 1e-4, atol=1e-30)


def test_what_is_not_a_number_is_passed_on() -> None:
    logits = torch.zeros(2, 32, dtype=torch.bfloat16)
    logits[1, 5] = torch.nan
    losses = torch.ops.lightning_peft.cross_entropy_gradient_(logits, torch.tensor([3, 3]))
    assert losses.isnan().tolist() == [False, True] and logits.isnan().any(1).tolist() == [False, True]


@pytest.mark.parametrize("label", [-100, 32])
def test_labels_outside_the_vocabulary_are_refused(label: int) -> None:
    logits = torch.zeros(2, 32, dtype=torch.bfloat16)
    with pytest.raises(IndexError, match=r"must be in \[0, 32\)"):
        torch.ops.lightning_peft.cross_entropy_gradient_(logits, torch.tensor([3, label]))


def test_takes_bf16_on_a_cpu_in_whole_vectors() -> None:
    assert cross_entropy.takes(torch.zeros(2, 32, dtype=torch.bfloat16))
    assert not cross_entropy.takes(torch.zeros(2, 32))
    assert not cross_entropy.takes(torch.zeros(2, 40, dtype=torch.bfloat16))
