"""The answers of a call: where they end, what their tokens are drawn by, and their texts, whoever computes scores."""

import logging
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing
from functools import cache

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lightning_peft.data.chat import end_token_ids
from lightning_peft.inference.answer_text import AnswerText
from lightning_peft.inference.continuous_batching import Choice, RunningSequence
from lightning_peft.inference.own_settings import declared_end_ids
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.models.rope import context_length

logger = logging.getLogger(__name__)


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, stops: Collection[int] = ()) -> set[int]:
    """Return the tokens at which answers end: the chat template's, those that the model declares, and `stops`."""
    return end_token_ids(tokenizer) | declared_end_ids(model) | set(stops)


class AnswerRows:
    """A row for each prompt, in their order; equal prompts draw different answers.

    An answer whose scores are not finite is empty.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        prompts: Sequence[list[int]],
        sampling: SamplingConfig,
        stops: Collection[int] = (),
        advance: Callable[[float], None] = lambda share: None,
    ):
        self.tokenizer, self.ends, self.advance = tokenizer, ends_of(model, tokenizer, stops), advance
        self.context = context_length(model.config)
        self.failed: dict[int, ValueError] = {}
        """Failures by the number of the prompt."""
        self.rows = [self._row(number, prompt, sampling) for number, prompt in enumerate(prompts)]

    def _row(self, number: int, prompt: list[int], sampling: SamplingConfig) -> RunningSequence:
        share, left = 1 / sampling.max_new_tokens, 1.0

        def goes_on(choice: Choice) -> bool:
            nonlocal left
            is_end = choice.token in self.ends
            done = left if is_end else share
            left -= done
            self.advance(done)
            return not is_end

        def fail(error: ValueError) -> None:
            self.failed[number] = error
            self.advance(left)

        return RunningSequence(prompt, sampling.of_answer(number), goes_on, wants_logprobs=False, on_failure=fail)

    def said(self, number: int) -> list[int]:
        """Return the tokens of an answer without its end, which a tokenizer need not know as a special one."""
        tokens = self.rows[number].tokens
        return [] if number in self.failed else tokens[:-1] if tokens and tokens[-1] in self.ends else tokens

    def texts(self) -> list[str]:
        """Return the texts of the answers, once they are there."""
        self.say_what_is_wrong()
        said = [self.said(number) for number in range(len(self.rows))]
        return self.tokenizer.batch_decode(said, skip_special_tokens=True)

    def pieces(self, tokens: Generator[int, None, None]) -> Iterator[str]:
        """Yield the text of the only answer as its tokens come. Raises ValueError where there is none."""
        text, handed_on = AnswerText(self.tokenizer), 0
        with closing(tokens):  # a thread that writes them is to be left behind by nobody
            for token in tokens:  # to their end, for the same reason
                if token not in self.ends:
                    text.add(token)
                if text.is_ready and len(text.whole) > handed_on:
                    yield text.whole[handed_on:]
                    handed_on = len(text.whole)
        if len(text.whole) > handed_on:
            yield text.whole[handed_on:]
        if self.failed:
            raise self.failed[0]
        self.say_what_is_wrong()

    def say_what_is_wrong(self) -> None:
        """Log what a reader of the answers has to know."""
        if self.failed:
            first = min(self.failed)
            logger.warning(
                "%d of %d answers are empty, the first of them that to prompt %d: %s",
                len(self.failed), len(self.rows), first + 1, self.failed[first],
            )  # fmt: skip
        beyond = [row for row in self.rows if self.context and len(row.prompt) + len(row.tokens) > self.context]
        if beyond:
            longest = max(len(row.prompt) for row in beyond)
            warn_once(
                f"{len(beyond)} of {len(self.rows)} answers end beyond the model's context of {self.context:,} tokens, "
                f"for which it was not made; the longest of their prompts has {longest:,}"
            )


@cache
def warn_once(line: str) -> None:
    logger.warning("%s", line)
