"""Sums of a window, and gradients scaled by them."""

import torch
from torch import nn

from lightning_peft.training.token_scaling import TokenWindow, scale_gradients


def test_window_gives_the_mean_per_token_and_starts_anew():
    window = TokenWindow()
    window.add(torch.tensor(6.0), 2)
    window.add(torch.tensor(1.0), 5)
    means = window.close()
    assert (means.loss.item(), means.weight.item(), means.tokens.item()) == (1.0, 7, 7)
    window.add(torch.tensor(3.0), 1)
    means = window.close()
    assert (means.loss.item(), means.weight.item(), means.measured) == (3.0, 1, {})


def test_window_of_pairs_counts_tokens_apart_and_gives_means_of_what_is_measured():
    window = TokenWindow()
    for loss, accuracy in ((3.0, (1.0, 1.0)), (5.0, (1.0, 3.0))):
        window.add(torch.tensor(loss), 2, 30, {"accuracy": tuple(map(torch.tensor, accuracy))})
    means = window.close()
    assert (means.loss.item(), means.weight.item(), means.tokens.item()) == (2.0, 4, 60)
    assert means.measured["accuracy"].item() == 0.5


def test_window_without_supervised_tokens_has_loss_zero():
    window = TokenWindow()
    window.add(torch.tensor(0.0), 0)
    means = window.close()
    assert (means.loss.item(), means.weight.item()) == (0.0, 0)


def test_gradients_are_scaled_in_place_and_missing_ones_left_out():
    trained, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    trained.grad = torch.tensor([2.0, 4.0])
    before = trained.grad
    scale_gradients([trained, unused], torch.tensor(0.5, dtype=torch.float64))
    assert trained.grad is before and before.tolist() == [1.0, 2.0] and unused.grad is None
