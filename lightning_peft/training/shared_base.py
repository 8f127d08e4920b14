"""One frozen base of several runs in a process, and the trees of modules that stand around it."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from lightning_peft.models.blocks import block_names
from lightning_peft.models.twin import copy_around_same_tensors
from lightning_peft.training.activation_checkpointing import checkpoint_blocks
from lightning_peft.training.config import ActivationCheckpointing
from lightning_peft.training.module import FinetuneModule
from lightning_peft.training.sliced_base import SlicedBase
from lightning_peft.training.strategies import ShardedModel


class SharedBase:
    """A base that is read once, by the first run that asks for it."""

    def __init__(self) -> None:
        self.template: PreTrainedModel | None = None
        self.slices: SlicedBase | None = None
        """The base where ranks hold slices of it, instead of a template."""
        self.checkpointing = ActivationCheckpointing.none

    def model(self, module: FinetuneModule, device: torch.device) -> tuple[PreTrainedModel, Iterator[str]]:
        """Return a new tree of modules around the base, as `load_by_block` does; the first call reads the base."""
        strategy = module.trainer.strategy
        if self.template is None and self.slices is None:
            model, blocks = FinetuneModule.read_base(module, device)
            if isinstance(strategy, ShardedModel):
                self.slices = SlicedBase(model, blocks, strategy.mesh)
            else:
                for _ in blocks:
                    pass
                self.template = model.to(device).requires_grad_(False)  # type: ignore[arg-type]  # as in load_model
            self.checkpointing = module.activation_checkpointing
        if self.slices is not None:
            return self.slices.model(device)
        assert self.template is not None
        model = copy_around_same_tensors(self.template)
        return model, iter(block_names(model))

    def bare_model(self) -> PreTrainedModel:
        """Return a new tree of modules around the base; its weights are on the meta device where ranks hold slices."""
        template = self.template if self.slices is None else self.slices.template
        assert template is not None
        return copy_around_same_tensors(template)

    def prepare(self, model: PreTrainedModel, root: nn.Module) -> None:
        """Have a bare model, and the root that holds it, checkpointed and sharded as a run's own are."""
        checkpoint_blocks(model, self.checkpointing)
        if self.slices is not None:
            self.slices.shard(model, root)
