"""A reward model: a number for each answer, which is to be larger for the better one of a pair."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.adapters.inject import adapters
from lightning_peft.adapters.registry import METHODS
from lightning_peft.data.batch import Batch
from lightning_peft.data.config import RowKind
from lightning_peft.models.blocks import decoder_of
from lightning_peft.models.reward_head import RewardHead, add_reward_head
from lightning_peft.objectives.logits import own_inputs
from lightning_peft.objectives.model_loss import ModelLoss, decoder_inputs
from lightning_peft.objectives.objective import Objective, ObjectiveConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # a start that trains nothing does without it

MEASURED = ("rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy")
"""Means over pairs that are logged."""


@dataclass
class RewardConfig(ObjectiveConfig):
    name: str = "reward"
    centering: float = 0.0
    """Factor of (r_w + r_l)^2, which keeps rewards around 0 (Eisenstein et al. 2023, arXiv:2312.09244, who take 0.01);
    0 leaves their mean free, as no pair says anything of it."""

    def __post_init__(self) -> None:
        if not self.centering >= 0:
            raise ValueError(f"objective.centering={self.centering}: must be 0 or more")


class RewardLoss(ModelLoss):
    """-log sigmoid(r_w - r_l - margin) + c (r_w + r_l)^2, summed over pairs   (Bradley-Terry; arXiv:2204.05862).

    The reward r of a sample is the head's number at its last token, be it one that the chat template adds, as
    transformers' sequence classification reads it. The margin is the row's, 0 without one (arXiv:2307.09288, eq. 2).
    """

    def __init__(self, model: "PreTrainedModel", config: RewardConfig, packing: bool | str):
        super().__init__(model, packing)
        self.config = config
        self.head: tuple[RewardHead] = (add_reward_head(model).requires_grad_(True),)  # the tuple hides the model's own
        refuse_trained_output(model)

    def check(self, batch: Batch) -> None:
        """See whether packed samples stay apart. Raises ValueError for a model without a decoder."""
        if decoder_of(self.model) is self.model:
            raise ValueError(
                f"objective=reward: {type(self.model).__name__} has no decoder that gives hidden states, of which a "
                "reward is read; use objective=dpo"
            )
        self.check_samples(batch)
        self.is_checked = True

    def loss_weight(self, batch: Batch) -> float:
        """Return the number of pairs."""
        assert batch.num_units is not None, "rows of preferences"
        return batch.num_units

    def forward(self, batch: Batch) -> Tensor:
        """Return the losses summed over the batch's pairs, fp32 scalar; 0 for a batch without any."""
        return self.judged(batch, self.rewards(batch))

    def judged(self, batch: Batch, rewards: Tensor) -> Tensor:
        """Return the losses of rewards (S,) summed over pairs, and leave what was measured in `measured`."""
        if batch.num_units == 0:
            loss = rewards.sum() * 0
            self.measured = dict.fromkeys(MEASURED, (loss.detach(), loss.detach()))
            return loss
        chosen, rejected = rewards.view(-1, 2).unbind(1)
        ahead = chosen - rejected
        losses = -F.logsigmoid(ahead if batch.margins is None else ahead - batch.margins)
        if self.config.centering:
            losses = losses + self.config.centering * (chosen + rejected).square()
        values = [value.detach() for value in (chosen, rejected, ahead, (ahead > 0).float())]
        self.measured = {
            name: (value.sum(), torch.ones_like(value).sum()) for name, value in zip(MEASURED, values, strict=True)
        }
        return losses.sum()

    def rewards(self, batch: Batch) -> Tensor:
        """Return the reward of every sample, (S,) fp32; a call may check first."""
        if not self.is_checked:
            self.check(batch)
        parts = self._parts(batch)
        found = torch.cat([self._rewards(part) for part in parts])
        if len(parts) == 1 and parts[0].sample_ids is None:
            return found
        numbers = torch.cat([part.sample_ids for part in parts if part.sample_ids is not None])
        return found.new_zeros(batch.cu_seqlens.numel() - 1).index_copy(0, numbers, found)

    def _rewards(self, batch: Batch) -> Tensor:
        inputs = own_inputs(batch.input_ids) if self.runs_apart else decoder_inputs(self.model, batch)
        with self._own_tokens(batch):
            hidden = decoder_of(self.model)(**inputs).last_hidden_state
        (head,) = self.head
        return head(hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.ends))


def refuse_trained_output(model: "PreTrainedModel") -> None:
    """Raise ValueError where the output head of tokens trains by itself, which no reward is read of."""
    output, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if output is None or next(adapters(model), None) is None:  # a base before its adapters is not frozen yet
        return
    shared = {id(parameter) for parameter in embeddings.parameters()}
    trained = [p for p in output.parameters() if p.requires_grad and id(p) not in shared]
    if trained:
        name = next(name for name, module in model.named_modules() if module is output)
        raise ValueError(
            f"objective=reward: {name} trains, and no reward is read of it; leave it out of adapter.target_modules and "
            "adapter.trainable_modules"
        )


def check_run(run: Any, objective: RewardConfig) -> None:
    """Raise ValueError for what a model that scores answers, and writes none, cannot have."""
    name = f"objective={objective.name}"
    method = run.adapter.method
    if method in METHODS and METHODS[method].trains_all:
        raise ValueError(
            f"{name} method={method}: its whole model would be saved as one that writes, without the "
            "head of the rewards; use method=lora"
        )
    if run.validation.metrics:
        raise ValueError(
            f"{name} validation.metrics={list(run.validation.metrics)}: are of answers, and a reward model writes "
            "none; leave them out, validation_rewards/accuracy is computed anyway"
        )
    if run.target_server:
        raise ValueError(f"{name} target_server={list(run.target_server)}: engines serve what writes answers")


OBJECTIVE = Objective(
    RewardConfig,
    RewardLoss,
    rows=RowKind.pairs,
    logs=MEASURED,
    formula="-log sigmoid(r_w - r_l - margin) + c (r_w + r_l)^2, r of a head at the last token",
    paper="arXiv:2204.05862",
    prepare=add_reward_head,
    gives_rewards=True,
    check=check_run,
)
