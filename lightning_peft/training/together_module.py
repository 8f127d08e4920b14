"""The Lightning module of one of several runs in a process: its passes are taken together, the rest is its own."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from lightning_peft.data.batch import Batch
from lightning_peft.objectives.model_loss import ModelLoss
from lightning_peft.objectives.sft import SFTConfig, SupervisedLoss
from lightning_peft.optim.sharded import drop_gradients
from lightning_peft.training.module import FinetuneModule
from lightning_peft.training.strategies import ShardedModel
from lightning_peft.training.together import Member


class CheckedLoss(SupervisedLoss):
    """The loss of a member. Its model runs validations alone: called in training it only checks the model."""

    def forward(self, batch: Batch) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(batch)
        self.check(batch)
        if self.runs_apart:
            raise ValueError(
                f"sweep.together: packed samples see each other in {type(self.model).__name__}, and so would those of "
                "several trials; train them apart, without sweep.together"
            )
        return batch.labels.new_zeros((), dtype=torch.float32)


class TogetherModule(FinetuneModule):
    """A `FinetuneModule` whose base is one that other runs of this process have too."""

    def __init__(self, member: Member, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._member = (member,)  # the tuple keeps it out of copies of this module

    @property
    def member(self) -> Member:
        return self._member[0]

    def read_base(self, device: torch.device) -> tuple[PreTrainedModel, Iterator[str]]:
        return self.member.group.base.model(self, device)

    def load(self, device: torch.device, sharding: ShardedModel | None) -> ModelLoss:
        loss = super().load(device, sharding)
        if (slices := self.member.group.base.slices) is not None:
            slices.share(loss.model, loss)
        return loss

    def build_objective(self, model: PreTrainedModel) -> ModelLoss:
        assert isinstance(self.objective_config, SFTConfig), "runs together learn by sft"
        # Whatever this run asks for, its rows are packed behind those of the others: that is to be checked.
        loss = CheckedLoss(model, self.packing or "auto", self.objective_config).train()
        self.member.model, self.member.loss = model, loss
        return loss

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.member.router_load = self.router_load

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            # Lightning lets go of the last step's gradients before it goes backward, behind the pass that makes new
            # ones for all: no member keeps them through it.
            drop_gradients(self.trainer.optimizers[0])
        return super().training_step(batch, batch_idx)

    def training_loss(self, batch: Batch) -> Tensor:
        assert self.objective is not None
        if not self.objective.is_checked:
            self.objective(batch)
            self.free_ends()
        return self.member.train_on(batch)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.free_ends()

    def free_ends(self) -> None:
        """Let go of what FSDP keeps gathered for a backward pass, embeddings and head: this model has none."""
        if isinstance(self.objective, FSDPModule):
            self.objective.reshard()
