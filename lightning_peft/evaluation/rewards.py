"""A reward model over held-out pairs: its loss, and how often the better answer has the larger reward."""

from collections.abc import Iterable, Sized

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from transformers import PreTrainedModel

from lightning_peft.data.batch import Batch
from lightning_peft.evaluation.gate import Metric
from lightning_peft.objectives.reward import RewardConfig, RewardLoss
from lightning_peft.progress import Part


@torch.inference_mode()
def reward_scores(model: PreTrainedModel, config: RewardConfig, batches: Iterable[Batch]) -> dict[str, Metric]:
    """Return the loss of a pair, `preference_accuracy` and `reward_margin`, with their values on every pair."""
    objective = RewardLoss(model, config, packing="auto").eval()
    found: list[Tensor] = []
    losses = 0.0
    batches_left = iter(batches)  # workers are forked before a thread of ours runs
    with Part("rewards of the validation pairs", len(batches) if isinstance(batches, Sized) else None) as part:
        for batch in batches_left:
            moved = move_data_to_device(batch, model.device)
            if batch.num_units:
                rewards = objective.rewards(moved)
                losses += float(objective.judged(moved, rewards))
                chosen, rejected = rewards.view(-1, 2).unbind(1)
                found.append((chosen - rejected).cpu())
            part.advance()
    ahead = torch.cat(found).double() if found else torch.zeros(0, dtype=torch.float64)
    if not len(ahead):
        raise ValueError("data has no validation pairs: give data.validation_path, or raise data.validation_fraction")
    right = (ahead > 0).double()
    return {
        "loss": Metric(losses / len(ahead), small_is_good=True),
        "preference_accuracy": Metric(float(right.mean()), right.tolist()),
        "reward_margin": Metric(float(ahead.mean()), ahead.tolist()),
    }
