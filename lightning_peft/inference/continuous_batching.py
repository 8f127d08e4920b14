"""Answers to requests that come and go: each step gives every running one a token, and a slot of adapters each row."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_peft.adapters.slots import Slots
from lightning_peft.inference.prompt_batches import OWN_ERRORS
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.inference.tried_steps import steps_of, tried_text

NOT_FINITE = "the scores of the next token are not finite, so there is no answer"
SMALLEST_TEMPERATURE = 1e-30
"""Temperature below which any difference of two fp32 scores decides as it does here."""


@dataclass
class Choice:
    """One generated token."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """The likeliest tokens and their logarithms of probability, as many as were asked for."""


@dataclass
class RunningSequence:
    """One answer being written."""

    prompt: list[int]
    sampling: SamplingConfig
    on_token: Callable[[Choice], bool]
    """Function that takes a token and returns whether the answer goes on."""
    slot: int = -1
    """Adapter slot; -1 is the base."""
    top_logprobs: int = 0
    wants_logprobs: bool = True
    """True where `Choice.logprob` is read; it is nan otherwise."""
    on_failure: Callable[[ValueError], None] | None = None
    """Function that takes the reason why a row ends without an answer; None goes on with what there is."""
    tokens: list[int] = field(default_factory=list)
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        self.generator.manual_seed(self.sampling.seed)

    @property
    def is_scored(self) -> bool:
        """Return whether more than the likeliest token is read from the scores."""
        return self.wants_logprobs or self.sampling.temperature > 0

    def take(self, best: int, scores: Tensor | None) -> bool:
        """Take the next token, `best` or one drawn from the scores (V,), fp32 on the host; return whether to go on."""
        token, logprob, top = best, math.nan, []
        if scores is not None:
            token = draw(scores, self.sampling, self.generator)
        if scores is not None and self.wants_logprobs:
            logprobs = scores.log_softmax(-1)
            logprob = float(logprobs[token])
            if self.top_logprobs:
                found = logprobs.topk(self.top_logprobs)
                top = list(zip(found.indices.tolist(), found.values.tolist(), strict=True))
        self.tokens.append(token)
        goes_on = self.on_token(Choice(token, logprob, top))
        return goes_on and len(self.tokens) < self.sampling.max_new_tokens


class Decoder:
    """The rows of one batch, one at a time where not `can_batch`. Used by one thread."""

    def __init__(self, model: PreTrainedModel, slots: Slots | None = None):
        self.model, self.slots = model, slots
        self.steps, self.can_batch = steps_of(model, slots)
        self.rows: list[RunningSequence] = []

    @torch.inference_mode()
    def add(self, *rows: RunningSequence) -> None:
        """Run the prompts of rows and give each its first token; those that go on take part in the next step."""
        added = sorted(rows, key=lambda row: row.slot)  # rows of one adapter side by side are read together
        scores = self.steps.begin([row.prompt for row in added], [row.slot for row in added])
        self.rows += added
        self._choose(scores, added)

    @torch.inference_mode()
    def step(self) -> list[RunningSequence]:
        """Give every row its next token; return those that ended."""
        scores = self.steps.step([row.tokens[-1] for row in self.rows], [row.slot for row in self.rows])
        return self._choose(scores, list(self.rows))

    @torch.inference_mode()
    def try_slot(self, slot: int) -> None:
        """Raise ValueError where the model computes with adapted layers by itself, or feeds them no rows of a batch.

        The rows of the batch are left alone.
        """
        text, steps = tried_text(self.model), type(self.steps)(self.model, self.slots)
        asked = [(text, slot), (text[: len(text) // 2], -1)]
        try:
            for group in [asked] if self.can_batch else [[each] for each in asked]:
                prompts, routes = [prompt for prompt, _ in group], [route for _, route in group]
                steps.begin(prompts, routes)
                steps.step([prompt[-1] for prompt in prompts], routes)
                steps.keep([])
        except torch.OutOfMemoryError:  # that failure says nothing of the model
            raise
        except OWN_ERRORS as error:
            raise ValueError(
                f"{type(self.model).__name__} cannot be asked through it beside others ({error}); "
                "`lightning-peft merge` makes a model of it and its base"
            ) from error

    def drop(self, rows: list[RunningSequence]) -> None:
        """Take rows out; the last ones take their places, so that no other moves."""
        gone = set(map(id, rows))
        kept = [i for i, row in enumerate(self.rows) if id(row) not in gone]
        last = [i for i in kept if i >= len(kept)]
        self._keep([i if id(self.rows[i]) not in gone else last.pop() for i in range(len(kept))])

    def clear(self) -> None:
        """Take all rows out."""
        self._keep([])

    @torch.inference_mode()
    def _keep(self, kept: list[int]) -> None:
        self.rows = [self.rows[i] for i in kept]
        self.steps.keep(kept)

    def _choose(self, scores: Tensor, rows: list[RunningSequence]) -> list[RunningSequence]:
        """Give rows, the last of the batch, a token from their scores (rows, V); take out and return those that end."""
        ended = choose(scores, rows)
        if ended:
            self.drop(ended)
        return ended


def choose(scores: Tensor, rows: Sequence[RunningSequence]) -> list[RunningSequence]:
    """Give each row its next token from its scores (rows, V); return those whose answers end."""
    highest, best = (found.tolist() for found in scores.float().max(-1))  # in bf16 this takes four times as long
    asked = [i for i, row in enumerate(rows) if row.is_scored]
    read = dict(zip(asked, scores[asked].float().cpu(), strict=True)) if asked else {}
    ended = []
    for i, row in enumerate(rows):
        if row.on_failure is not None and not math.isfinite(highest[i]):
            row.on_failure(ValueError(NOT_FINITE))
            ended.append(row)
        elif not row.take(best[i], read.get(i)):
            ended.append(row)
    return ended


def draw(scores: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> int:
    """Return the next token from its scores (V,): the best, or one drawn from the smallest set of `top_p`.

    Each token has a random number of its own, whatever its rank: scores that were rounded otherwise mostly draw it too.
    """
    if sampling.temperature == 0:
        return int(scores.argmax())
    # At a tiny temperature the quotients of the scores themselves would have no fp32 number.
    quotients = (scores - scores.max()) / max(sampling.temperature, SMALLEST_TEMPERATURE)
    shares = quotients.softmax(-1)
    if sampling.top_p < 1:
        shares = smallest_set(shares, sampling.top_p)
    return int(torch.multinomial(shares, 1, generator=generator))


def smallest_set(shares: Tensor, top_p: float) -> Tensor:
    """Return shares (V,) with zeros for all but the smallest set of tokens that holds `top_p` of them."""
    # All tokens with less than this have less than 1 - top_p together: a few remain to be sorted, not a vocabulary.
    candidates = (shares >= (1 - top_p) / len(shares)).nonzero()[:, 0]
    found, order = shares[candidates].sort(descending=True)
    kept = found.cumsum(-1) - found < top_p
    return torch.zeros_like(shares).index_copy_(0, candidates[order[kept]], found[kept])
