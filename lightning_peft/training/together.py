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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lightning_peft import distributed
from lightning_peft.adapters.segments import in_passes
from lightning_peft.cluster.process import LEAVE
from lightning_peft.data.batch import Batch
from lightning_peft.training.failed_alike import FailedAlike
from lightning_peft.training.host_memory import share_heap
from lightning_peft.training.preemption import Preempted, PreemptionSignals
from lightning_peft.training.shared_base import SharedBase
from lightning_peft.training.shared_passes import Participant, PassAnswer, SharedPasses

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class Member(Participant):
    """One of the runs of a group, as its thread sees it."""

    def __init__(self, group: "RunGroup", number: int, name: str):
        super().__init__(number)
        self.group, self.name = group, name
        self.answer: PassAnswer | BaseException | None = None
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
        self.base = SharedBase()
        self.failures: FailedAlike | None = None

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
                self.passes = SharedPasses(self.base, [member for member in self.members if not member.is_done])
            answers: Sequence[Any] = self.passes.take(members)
        except Exception as error:  # each of them fails by it, as a lone run does
            answers = [error] * len(members)
        for member, answer in zip(members, answers, strict=True):
            member.batch, member.answer = None, answer


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
