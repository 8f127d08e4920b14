"""Several runs in one process on one frozen base: each its own Trainer, the passes through the base taken together.

Each run is a thread in which the code of a lone run works: its trainer, callbacks, optimiser, checkpoints and loggers.
Only one thread works at a time, in a fixed order, so that ranks do the same things in the same order and a run finds
the random numbers where it left them. In a training step a run hands over its micro batch and waits; once all have,
passes forward and backward take the tokens of as many runs as fill one, as one row of packed samples, and each run is
given its loss and the gradients of its adapters. Its own backward pass puts them where autograd would have, so DDP's
hooks see them.
"""

import gc
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lightning_peft import distributed
from lightning_peft.adapters.segments import BatchShares, SegmentedLinear, Share, in_passes, segment_layers
from lightning_peft.cluster.process import LEAVE
from lightning_peft.data.batch import Batch
from lightning_peft.kernels.cross_entropy import weighted_sum
from lightning_peft.models.blocks import block_names
from lightning_peft.models.twin import copy_around_same_tensors
from lightning_peft.objectives.embedding_noise import changed_embeddings, with_noise
from lightning_peft.objectives.model_loss import ModelLoss, TokenLosses
from lightning_peft.optim.sharded import local
from lightning_peft.training.activation_checkpointing import checkpoint_blocks
from lightning_peft.training.config import ActivationCheckpointing
from lightning_peft.training.failed_alike import FailedAlike
from lightning_peft.training.host_memory import share_heap
from lightning_peft.training.module import FinetuneModule
from lightning_peft.training.preemption import Preempted, PreemptionSignals
from lightning_peft.training.router_load import RouterLoad
from lightning_peft.training.sliced_base import SlicedBase
from lightning_peft.training.strategies import ShardedModel
from lightning_peft.training.whole_adapters import sliced_means, whole_adapters

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


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


class Member:
    """One of the runs of a group, as its thread sees it."""

    def __init__(self, group: "RunGroup", number: int, name: str):
        self.group, self.number, self.name = group, number, name
        self.model: PreTrainedModel | None = None
        """Its tree of modules: adapters of its own around weights that all share."""
        self.loss: ModelLoss | None = None
        self.router_load: RouterLoad | None = None
        """Load of its experts that it logs; None where it has none, or does not log them."""
        self.batch: Batch | None = None
        """Batch that it waits to have run."""
        self.answer: PassAnswer | BaseException | None = None
        self.random: dict[str, Tensor] = {}
        """State of its random numbers while another thread works."""
        self.turn = threading.Semaphore(0)
        self.is_done = False

    def train_on(self, batch: Batch) -> Tensor:
        """Return the loss of a micro batch, fp32 scalar, from a pass that all members' batches share."""
        assert self.model is not None
        self.batch = batch
        self.group.back.release()
        self.turn.acquire()
        answer, self.answer = self.answer, None
        if isinstance(answer, BaseException):
            raise answer
        assert answer is not None
        return answer.as_loss()


class MemberSignals(PreemptionSignals):
    """The reasons for which one run of a group leaves: those of the process, its own time limit, or the file LEAVE."""

    def __init__(self, group: "RunGroup", max_seconds: float | None, run_dir: Path):
        super().__init__(max_seconds)
        self.group, self.leave = group, run_dir / LEAVE

    @property
    def received(self) -> signal.Signals | None:
        return self.group.signals.received

    @property
    def reason(self) -> type[Preempted] | None:
        if (reason := super().reason) is not None or not self.leave.exists():
            return reason
        logger.info("%s: asked to leave", self.leave)
        return Preempted

    def start(self) -> None:
        self._started_at = time.monotonic()

    def stop(self) -> None:
        self.leave.unlink(missing_ok=True)


@dataclass
class MemberOutcome(Generic[Result]):
    """The end of one member: what it returned, or what it raised."""

    value: Result | None = None
    error: BaseException | None = None


class RunGroup:
    """Runs that train together. The thread that calls `run` takes the shared passes and the signals."""

    def __init__(self, names: Sequence[str]):
        self.members = [Member(self, number, name) for number, name in enumerate(names)]
        self.signals = PreemptionSignals()
        self.back = threading.Semaphore(0)
        self.passes: SharedPasses | None = None
        self.template: PreTrainedModel | None = None
        self.slices: SlicedBase | None = None
        """The base where ranks hold slices of it, instead of a template."""
        self.checkpointing = ActivationCheckpointing.none
        self.failures: FailedAlike | None = None

    def base(self, module: FinetuneModule, device: torch.device) -> tuple[PreTrainedModel, Iterator[str]]:
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

    def run(
        self,
        works: Sequence[Callable[[Member], Result]],
        ended: Callable[[int, MemberOutcome[Result]], None] = lambda number, outcome: None,
    ) -> list[MemberOutcome[Result]]:
        """Do each member's work until all have ended, and return how each did; `ended` is called when one has."""
        outcomes: list[MemberOutcome[Result]] = [MemberOutcome() for _ in self.members]

        def work(member: Member) -> None:
            member.turn.acquire()
            try:
                outcomes[member.number].value = works[member.number](member)
            except BaseException as error:
                outcomes[member.number].error = error
            member.is_done = True
            self.back.release()

        share_heap()
        self.failures = FailedAlike()
        start = random_states()
        for member in self.members:
            member.random = start
            threading.Thread(target=work, args=(member,), name=member.name, daemon=True).start()

        def give_turns(members: Sequence[Member]) -> None:
            for member in members:
                self.give_turn(member)
                if member.is_done:
                    self.check_all_failed(member, outcomes[member.number].error)
                    ended(member.number, outcomes[member.number])
                    self.forget(member, outcomes[member.number])

        try:
            give_turns(self.members)
            while present := [member for member in self.members if not member.is_done]:
                for members in self.by_pass(present):
                    self.take_pass(members)
                    give_turns(members)  # so that their gradients are gone before the next pass
        finally:
            self.signals.stop()
            self.failures.stop()
        return outcomes

    def by_pass(self, present: Sequence[Member]) -> list[Sequence[Member]]:
        """Return the members that wait, those of each pass; it is the same on every rank."""
        batches = [member.batch for member in present if member.batch is not None]
        tokens = distributed.highest_of_each([batch.input_ids.numel() for batch in batches])
        return [present[run] for run in in_passes(tokens, batches[0].input_ids.device.type)]

    def give_turn(self, member: Member) -> None:
        """Let a member work until it waits for a pass, or has ended."""
        restore_random(member.random)
        member.turn.release()
        self.back.acquire()
        member.random = random_states()

    def check_all_failed(self, member: Member, error: BaseException | None) -> None:
        """Raise RuntimeError for a member that failed on this rank and not on all, and its error where a rank is gone.

        It waits elsewhere for what this rank does no more, and would be answered by what the next member does here.
        """
        assert self.failures is not None
        if error is None or isinstance(error, Preempted):
            return
        if distributed.is_lost_rank(error):
            raise error
        if self.failures.on_all(member.number):
            return
        raise RuntimeError(
            f"{member.name} failed on rank {distributed.rank()} and not on all ({type(error).__name__}: {error}): no "
            "member of its group can go on; each resumes from its last checkpoint"
        ) from error

    def forget(self, member: Member, outcome: MemberOutcome[Result]) -> None:
        """Free what a member that has ended still holds: the others may train for days."""
        member.model = member.loss = member.router_load = None
        if self.passes is not None:
            self.passes.forget(member.number)
        error, seen = outcome.error, set[int]()
        while error is not None and id(error) not in seen:
            seen.add(id(error))
            error.__traceback__ = None  # its frames hold its trainer
            error = error.__cause__ or error.__context__
        gc.collect()  # Trainer and module know each other

    def take_pass(self, members: Sequence[Member]) -> None:
        """Answer members that wait."""
        try:
            if self.passes is None:
                self.signals.start()
                self.passes = SharedPasses(self, [member for member in self.members if not member.is_done])
            answers: Sequence[Any] = self.passes.take(members)
        except Exception as error:  # each of them fails by it, as a lone run does
            answers = [error] * len(members)
        for member, answer in zip(members, answers, strict=True):
            member.batch, member.answer = None, answer


class RowLosses(ModelLoss):
    """The model that takes the tokens of all members in one row. Its forward gathers it where ranks hold slices."""

    def forward(self, batch: Batch) -> TokenLosses:  # type: ignore[override]  # each member's sum is taken outside
        return self.token_losses(batch)


class SharedPasses:
    """The passes through the base that take the tokens of all members."""

    def __init__(self, group: RunGroup, members: Sequence[Member]):
        template = group.template if group.slices is None else group.slices.template
        assert template is not None
        self.batching = BatchShares()
        model = copy_around_same_tensors(template)
        models = {member.number: member.model for member in members if member.model is not None}
        segment_layers(model, self.batching, models)
        checkpoint_blocks(model, group.checkpointing)
        self.loss = RowLosses(model).train()
        self.is_sliced = group.slices is not None
        """True where ranks hold slices of the members' parameters."""
        if group.slices is not None:
            group.slices.shard(model, self.loss)
        checked = members[0].loss
        assert checked is not None
        self.loss.logit_path, self.loss.is_checked = checked.logit_path, True
        self.loss.label_smoothing = checked.label_smoothing  # it is the same for all
        self.router_loads = {member.number: RouterLoad(model) for member in members if member.router_load is not None}

    def take(self, members: Sequence[Member]) -> list[PassAnswer]:
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

    def noise(self, members: Sequence[Member], batches: Sequence[Batch]) -> AbstractContextManager[None]:
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


def random_states() -> dict[str, Tensor]:
    """Return where the generators stand that torch's functions draw from, by kind of device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
