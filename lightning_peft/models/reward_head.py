"""The head of a reward model: one number for a text, of what the decoder gives at its last token."""

import torch
from torch import Tensor, nn

REWARD_HEAD = "score"
"""Name of the head in a model, which is that of transformers' sequence classification."""


class RewardHead(nn.Module):
    """r = w h, in fp32: h (..., D) -> (...,).

    Not a linear layer, so that no pattern of target modules adapts it and nothing quantises it.
    """

    def __init__(self, width: int, device: torch.device | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, width, device=device, dtype=torch.float32))

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight.float()).squeeze(-1)


def add_reward_head(model: nn.Module, seed: int = 0) -> RewardHead:
    """Give a causal model a reward head, drawn as transformers draws one; a second call changes nothing."""
    if (head := reward_head(model)) is not None:
        return head
    if hasattr(model, REWARD_HEAD):
        raise ValueError(f"{type(model).__name__} has a module {REWARD_HEAD} of its own, where a reward head would be")
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    device = next(model.parameters()).device
    head = RewardHead(config.hidden_size, device)
    if device.type != "meta":
        std = getattr(config, "initializer_range", 0.02)
        drawn = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed)) * std
        head.weight.data.copy_(drawn)
    model.add_module(REWARD_HEAD, head.requires_grad_(False))
    return head


def reward_head(model: nn.Module) -> RewardHead | None:
    """Return the reward head of a model, None where it has none."""
    head = getattr(model, REWARD_HEAD, None)
    return head if isinstance(head, RewardHead) else None
