"""Passes through one frozen base that take the micro batches of several runs as one row of packed samples.

Each run is given its loss and the gradients of its adapters. Its own backward pass puts them where autograd would have,
so DDP's hooks see them.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lightning_peft.adapters.segments import BatchShares, SegmentedLinear, Share, segment_layers
from lightning_peft.data.batch import Batch
from lightning_peft.kernels.cross_entropy import weighted_sum
from lightning_peft.objectives.embedding_noise import changed_embeddings, with_noise
from lightning_peft.objectives.model_loss import ModelLoss, TokenLosses
from lightning_peft.optim.sharded import local
from lightning_peft.training.router_load import RouterLoad
from lightning_peft.training.shared_base import SharedBase
from lightning_peft.training.whole_adapters import sliced_means, whole_adapters


class Participant:
    """A run as the passes see it."""

    def __init__(self, number: int):
        self.number = number
        self.model: PreTrainedModel | None = None
        """Its tree of modules: adapters of its own around weights that all share."""
        self.loss: ModelLoss | None = None
        self.router_load: RouterLoad | None = None
        """Load of its experts that it logs; None where it has none, or does not log them."""
        self.batch: Batch | None = None
        """Batch that it waits to have run."""
        self.random: dict[str, Tensor] = {}
        """State of its random numbers while another run works."""


class HandedLoss(torch.autograd.Function):
    """A loss whose gradients are known already: the backward pass scales them and hands them on."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        torch._foreach_mul_([local(gradient) for gradient in gradients if gradient is not None], grads[0])
        return None, None, *gradients


class PassAnswer(NamedTuple):
    """Loss and gradients of a member's batch."""

    loss: Tensor
    """Summed over its batch, fp32."""
    parameters: list[nn.Parameter]
    """Parameters that it trains."""
    gradients: list[Tensor | None]
    """A gradient for each parameter."""

    def as_loss(self) -> Tensor:
        """Return the loss, whose backward pass gives the parameters their gradients."""
        return HandedLoss.apply(self.loss, self.gradients, *self.parameters)


class RowLosses(ModelLoss):
    """The model that takes the tokens of all members in one row. Its forward gathers it where ranks hold slices."""

    def forward(self, batch: Batch) -> TokenLosses:  # type: ignore[override]  # each member's sum is taken outside
        return self.token_losses(batch)


class SharedPasses:
    """The passes through the base that take the tokens of all members."""

    def __init__(self, base: SharedBase, members: Sequence[Participant]):
        self.batching = BatchShares()
        model = base.bare_model()
        models = {member.number: member.model for member in members if member.model is not None}
        segment_layers(model, self.batching, models)
        self.loss = RowLosses(model).train()
        base.prepare(model, self.loss)
        self.is_sliced = base.slices is not None
        """True where ranks hold slices of the members' parameters."""
        checked = members[0].loss
        assert checked is not None
        self.loss.logit_path, self.loss.is_checked = checked.logit_path, True
        self.loss.label_smoothing = checked.label_smoothing  # it is the same for all
        self.router_loads = {member.number: RouterLoad(model) for member in members if member.router_load is not None}

    def take(self, members: Sequence[Participant]) -> list[PassAnswer]:
        """Run the members' batches forward and backward."""
        batches = [member.batch for member in members if member.batch is not None]
        joined = in_one_row(batches)
        shares, start = {}, 0
        for member, batch in zip(members, batches, strict=True):
            stop = start + batch.input_ids.numel()
            shares[member.number] = Share(start, stop, member.random[batch.input_ids.device.type])
            if member.router_load is not None:
                load = self.router_loads[member.number]
                load.start()
                load.rows = slice(start, stop)
            start = stop
        self.batching.begin(shares)
        own_parameters = trained = [trained_parameters(member.model) for member in members]
        with ExitStack() as gathered, torch.enable_grad():
            if self.is_sliced:
                for member in members:
                    assert member.model is not None
                    gathered.enter_context(whole_adapters(member.model))
                trained = [trained_parameters(member.model) for member in members]
            with self.noise(members, batches):
                tokens = self.loss(joined)
            for member in members:
                if member.router_load is not None:  # counted up to here: the backward pass may run blocks again
                    member.router_load.counts = dict(self.router_loads[member.number].counts)
            counts = [batch.num_supervised for batch in batches]
            weights = [None] * len(batches) if tokens.weights is None else tokens.weights.split(counts)
            losses = [
                weighted_sum(own, None if batch.weights is None else weight)
                for own, weight, batch in zip(tokens.losses.split(counts), weights, batches, strict=True)
            ]
            gradients = list(torch.autograd.grad(
                torch.stack(losses).sum(), [parameter for own in trained for parameter in own], allow_unused=True
            ))  # fmt: skip
        answers = []
        for member, loss, own in zip(members, losses, own_parameters, strict=True):
            member.random[joined.input_ids.device.type] = self.batching.random[member.number].state
            answers.append(PassAnswer(loss.detach(), own, in_one_block(sliced_means(gradients[: len(own)], own))))
            del gradients[: len(own)]
        return answers

    def noise(self, members: Sequence[Participant], batches: Sequence[Batch]) -> AbstractContextManager[None]:
        """Return a context: each batch's embeddings have the noise that its member trains with, drawn as by itself."""
        alphas = [0.0 if member.loss is None else member.loss.noise_alpha for member in members]
        if not any(alphas):
            return nullcontext()

        def change(embedded: Tensor) -> Tensor:
            parts = []
            for member, batch, alpha in zip(members, batches, alphas, strict=True):
                share = self.batching.shares[member.number]
                part = embedded[0, share.start : share.stop].view(*batch.input_ids.shape, -1)
                if alpha:
                    with self.batching.random[member.number].drawn_from(embedded.device):
                        part = with_noise(part, batch, alpha)
                parts.append(part.reshape(1, -1, embedded.shape[-1]))
            return torch.cat(parts, 1)

        return changed_embeddings(self.loss.model, change)

    def forget(self, number: int) -> None:
        """Let go of what belongs to a member that has ended."""
        self.batching.forget(number)
        if (load := self.router_loads.pop(number, None)) is not None:
            load.stop()
        for module in self.loss.model.modules():
            if isinstance(module, SegmentedLinear):
                module.forget(number)


def in_one_block(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return gradients as parts of one tensor, which slices are already.

    Optimiser states would come to lie between single ones, and leave no hole for activations.
    """
    own = [gradient for gradient in gradients if gradient is not None]
    if not own or isinstance(own[0], DTensor) or len({gradient.dtype for gradient in own}) > 1:
        return list(gradients)
    block = torch.cat([gradient.reshape(-1) for gradient in own])
    parts = iter(block.split([gradient.numel() for gradient in own]))
    return [None if gradient is None else next(parts).view_as(gradient) for gradient in gradients]


def in_one_row(batches: Sequence[Batch]) -> Batch:
    """Return the batches' rows one after the other as a single row of packed samples."""
    starts = [0]
    for batch in batches:
        starts.append(starts[-1] + batch.input_ids.numel())
    bounds = [batch.cu_seqlens[:-1] + start for batch, start in zip(batches, starts, strict=False)]
    weights = None
    if any(batch.weights is not None for batch in batches):
        each = [torch.ones_like(b.labels, dtype=torch.float32) if b.weights is None else b.weights for b in batches]
        weights = torch.cat([weight.reshape(1, -1) for weight in each], 1)
    return Batch(
        input_ids=torch.cat([batch.input_ids.reshape(1, -1) for batch in batches], 1),
        labels=torch.cat([batch.labels.reshape(1, -1) for batch in batches], 1),
        position_ids=torch.cat([batch.position_ids.reshape(1, -1) for batch in batches], 1),
        cu_seqlens=torch.cat([*bounds, bounds[-1].new_tensor([starts[-1]])]),
        max_seqlen=max(batch.max_seqlen for batch in batches),
        num_tokens=sum(batch.num_tokens for batch in batches),
        num_supervised=sum(batch.num_supervised for batch in batches),
        weights=weights,
    )


def trained_parameters(model: nn.Module | None) -> list[nn.Parameter]:
    assert model is not None
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
