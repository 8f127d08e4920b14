"""Answers to requests that come and go: each step gives every running one a token, and a slot of adapters each row."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_peft.adapters.slots import Slots
from lightning_peft.inference.prompt_batches import OWN_ERRORS, is_close
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.inference.static_steps import StaticSteps, why_not_static
from lightning_peft.inference.steps import AnewSteps, PlainSteps, Steps, cache_keyword, can_pad_left
from lightning_peft.quantization.weights import computing_dtype

logger = logging.getLogger(__name__)

TRIED_TOKENS = 8
"""Tokens with which it is tried whether a model takes a cache."""
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
    """The rows of one batch. Used by one thread."""

    def __init__(self, model: PreTrainedModel, slots: Slots | None = None):
        self.model = model
        self.steps = steps_of(model, slots)
        self.can_batch = not isinstance(self.steps, PlainSteps) or can_pad_left(model)
        """False where rows have to come one at a time."""
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


def steps_of(model: PreTrainedModel, slots: Slots | None) -> Steps:
    """Return the fastest steps that compute a model."""
    if why_not_static(model) is None:
        return StaticSteps(model, slots)
    if (reason := why_without_cache(model)) is None:
        return PlainSteps(model, slots)
    logger.info("%s: each token is computed from all before it, as %s", type(model).__name__, reason)
    return AnewSteps(model, slots)


@torch.inference_mode()
def why_without_cache(model: PreTrainedModel) -> str | None:
    """Return why `PlainSteps` do not compute a model; None where they do, which is tried on a few tokens.

    Some families keep what no cache of transformers holds, and a forward pass may swallow an argument unread.
    """
    if cache_keyword(model) is None:
        return "it takes no cache of transformers"
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = [token % vocabulary for token in range(1, TRIED_TOKENS + 1)]
    steps = PlainSteps(model, None)
    try:
        found = [steps.begin([ids[:-2]], [-1]), *(steps.step([token], [-1]) for token in ids[-2:])]
    except torch.OutOfMemoryError:  # that failure says nothing of the model
        raise
    except OWN_ERRORS as error:
        return f"its cache fails: {' '.join(str(error).split())[:120]}"
    expected = AnewSteps(model, None).begin([ids], [-1])
    return None if is_close(found[-1].float(), expected.float(), computing_dtype(model)) else "its cache gives others"


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
    """Return the next token from its scores (V,): the best, or one drawn from the smallest set of `top_p`."""
    if sampling.temperature == 0:
        return int(scores.argmax())
    # At a tiny temperature the quotients of the scores themselves would have no fp32 number.
    quotients = (scores - scores.max()) / max(sampling.temperature, SMALLEST_TEMPERATURE)
    shares, order = quotients.softmax(-1).sort(descending=True)
    before = shares.cumsum(-1) - shares
    shares = torch.where(before < sampling.top_p, shares, 0.0)
    return int(order[torch.multinomial(shares, 1, generator=generator)])
