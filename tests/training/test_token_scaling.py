"""Sums of a window, and gradients scaled by them."""

import torch
from torch import nn

from lightning_peft.training.token_scaling import TokenWindow, scale_gradients


def test_window_gives_the_mean_per_token_and_starts_anew():
    window = TokenWindow()
    window.add(torch.tensor(6.0), 2)
    window.add(torch.tensor(1.0), 5)
    loss, tokens = window.close()
    assert (loss.item(), tokens.item()) == (1.0, 7)
    window.add(torch.tensor(3.0), 1)
    assert [value.item() for value in window.close()] == [3.0, 1]


def test_window_without_supervised_tokens_has_loss_zero():
    window = TokenWindow()
    window.add(torch.tensor(0.0), 0)
    assert [value.item() for value in window.close()] == [0.0, 0]


def test_gradients_are_scaled_in_place_and_missing_ones_left_out():
    trained, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    trained.grad = torch.tensor([2.0, 4.0])
    before = trained.grad
    scale_gradients([trained, unused], torch.tensor(0.5, dtype=torch.float64))
    assert trained.grad is before and before.tolist() == [1.0, 2.0] and unused.grad is None
