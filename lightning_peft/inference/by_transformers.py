"""Answers by transformers' `generate`: of models, and under settings, that our decoder does not take.

The decoder of other models decides here too which token is taken, and where an answer ends.
"""

import logging
from collections.abc import Generator
from dataclasses import replace
from functools import cache
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from lightning_peft.inference.answer_rows import AnswerRows
from lightning_peft.inference.continuous_batching import RunningSequence, choose
from lightning_peft.inference.own_settings import generation_config, only_what_is_asked, room_for
from lightning_peft.inference.prompt_batches import (
    CHECKED_TOKENS,
    OWN_ERRORS,
    Batching,
    Prompts,
    batches,
    choose_batching,
    pad_left,
)
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.inference.tried_steps import TRIED_TOKENS

logger = logging.getLogger(__name__)


@cache
def say_once(line: str) -> None:
    logger.info("%s", line)


class Choosing(LogitsProcessor):
    """The choice of the next tokens, as scores that leave no other; it stands behind what changes scores."""

    def __init__(self, rows: list[RunningSequence]):
        self.rows = rows
        self.going = list(range(len(rows)))
        """Places of the rows whose answers go on."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.going:
            ended = {id(row) for row in choose(scores[self.going], [self.rows[i] for i in self.going])}
            self.going = [i for i in self.going if id(self.rows[i]) not in ended]
        # Rows that have ended are padded, whatever is chosen.
        tokens = torch.tensor([row.tokens[-1:] or [0] for row in self.rows], device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)


class Ended(StoppingCriteria):
    """The end of rows whose answers do not go on, and of those that come to a text at which the model stops."""

    def __init__(self, choosing: Choosing, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast):
        self.choosing = choosing
        stops = getattr(model.generation_config, "stop_strings", None)
        self.at_texts = StopStringCriteria(tokenizer, stops) if stops else None

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Any:
        choosing = self.choosing
        if self.at_texts is not None:
            stopped = self.at_texts(input_ids, scores).tolist()
            choosing.going = [i for i in choosing.going if not stopped[i]]
        ended = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        ended[choosing.going] = False
        return ended


def run(
    model: PreTrainedModel, answers: AnswerRows, rows: list[RunningSequence], way: Prompts, config: GenerationConfig
) -> None:
    """Run rows of answers to their ends, side by side."""
    choosing = Choosing(rows)
    ended = Ended(choosing, model, answers.tokenizer)
    with torch.inference_mode(), only_what_is_asked(model):
        model.generate(  # type: ignore[operator]
            **way.inputs([row.prompt for row in rows], config.pad_token_id),
            generation_config=config,
            logits_processor=LogitsProcessorList([choosing]),
            stopping_criteria=StoppingCriteriaList([ended]),
        )


def generated(model: PreTrainedModel, answers: AnswerRows, sampling: SamplingConfig, batch_size: int) -> None:
    """Write all answers; how prompts share a batch is tried on two of them first.

    An answer that may be cut by the end of the model's positions comes alone, where that end is its own.
    """
    rows = answers.rows
    most = max(sampling.max_new_tokens, CHECKED_TOKENS)
    room = room_for(model, [row.prompt for row in rows], most)
    short = [i for i, left in enumerate(room) if left < most]
    free = [i for i in range(len(rows)) if i not in set(short)]
    config = generation_config(sampling, answers.ends, answers.tokenizer, model)
    config.use_cache = takes_cache(model, rows[0].prompt, config.pad_token_id)
    prompts = [rows[i].prompt for i in free]
    way = Prompts(model, Batching.alone, use_cache=config.use_cache)
    if len(free) > 1:
        way = choose_batching(model, prompts, config.pad_token_id, config.use_cache)
    for group in batches(prompts, way.batching, batch_size):
        run(model, answers, [rows[free[i]] for i in group], way, config)
    for i in short:
        config.max_new_tokens = min(sampling.max_new_tokens, room[i])
        rows[i].sampling = replace(rows[i].sampling, max_new_tokens=config.max_new_tokens)
        run(model, answers, [rows[i]], way, config)


def generated_tokens(
    model: PreTrainedModel, answers: AnswerRows, sampling: SamplingConfig
) -> Generator[int, None, None]:
    """Yield the tokens of the only answer as they come; `generate` runs in a thread, which ends with the last of them.

    A caller that takes no more of them ends it too: it holds the model's generation config meanwhile.
    """
    (row,) = answers.rows
    config = generation_config(sampling, answers.ends, answers.tokenizer, model)
    (config.max_new_tokens,) = room_for(model, [row.prompt], sampling.max_new_tokens)
    config.use_cache = takes_cache(model, row.prompt, config.pad_token_id)
    tokens: SimpleQueue[int | None] = SimpleQueue()
    failure: list[BaseException] = []
    left, goes_on = Event(), row.on_token

    def hand_on(choice: Any) -> bool:
        tokens.put(choice.token)
        return goes_on(choice) and not left.is_set()

    def write() -> None:
        try:
            run(model, answers, [row], Prompts(model, Batching.alone), config)
        except BaseException as error:  # the error is handed to the caller's thread below
            failure.append(error)
        finally:
            tokens.put(None)

    row.on_token = hand_on
    thread = Thread(target=write, daemon=True)
    thread.start()
    try:
        yield from iter(tokens.get, None)
    finally:
        left.set()
        thread.join()
    if failure:
        raise failure[0]


@torch.inference_mode()
def takes_cache(model: PreTrainedModel, prompt: list[int], pad_id: int) -> bool:
    """Return whether a model runs with the cache that transformers' `generate` makes for it, by trying two tokens.

    Raises ValueError for one that gives no answers without a cache either.
    """
    inputs = pad_left([prompt[-TRIED_TOKENS:]], 0, pad_id, model.device)
    for use_cache in (True, False):
        config = GenerationConfig(
            max_new_tokens=2, do_sample=False, pad_token_id=pad_id, eos_token_id=None, use_cache=use_cache
        )
        try:
            with only_what_is_asked(model):
                model.generate(**inputs, generation_config=config)  # type: ignore[operator]
        except torch.OutOfMemoryError:  # that failure says nothing of the model
            raise
        except OWN_ERRORS as error:
            reason = " ".join(str(error).split())[:120]
            continue
        if not use_cache:
            say_once(f"{type(model).__name__}: each token is computed from all before it, as its cache fails: {reason}")
        return use_cache
    raise ValueError(f"{type(model).__name__} gives no answers: {reason}; it trains, scores its loss and merges")
