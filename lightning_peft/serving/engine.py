"""The thread that answers: requests wait in a queue, join the batch, and leave it when they end."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from lightning_peft.inference.answer_text import AnswerText
from lightning_peft.inference.continuous_batching import Choice, Decoder, RunningSequence
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.inference.steps import PREFILL_TOKENS
from lightning_peft.inference.token_ids import check_token_ids
from lightning_peft.serving.tiers import AdapterTiers

logger = logging.getLogger(__name__)


class QueueFullError(RuntimeError):
    """A queue in which as many requests wait as may."""


@dataclass(frozen=True)
class Piece:
    """A part of an answer."""

    text: str = ""
    choice: Choice | None = None
    finish_reason: str | None = None
    """stop or length, of the last piece."""
    error: Exception | None = None
    """Reason why there is no answer: a ValueError speaks to the client."""


@dataclass
class GenerationRequest:
    """A request: its prompt, and who takes its pieces."""

    prompt: list[int]
    sampling: SamplingConfig
    end_ids: frozenset[int]
    """Tokens at which the answer ends."""
    take: Callable[[Piece], None]
    """Function that takes a piece, called in the engine's thread."""
    folder: Path | None = None
    """The adapter's folder; None is the model as it was loaded."""
    before: tuple[int, ...] = ()
    """Tokens of a text that the answer goes on with, as some tokenizers drop a blank at the beginning of a text."""
    stops: tuple[str, ...] = ()
    """Texts at which the answer ends; they are no part of it."""
    wants_logprobs: bool = False
    """True where the client reads `Choice.logprob`: a softmax over the vocabulary for each token."""
    top_logprobs: int = 0
    cancelled: bool = False
    finished: bool = False
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    """Text that was handed on."""


class Engine:
    """Answers requests with one model in one thread, up to `max_batch` of them side by side."""

    def __init__(
        self,
        decoder: Decoder,
        tiers: AdapterTiers | None,
        tokenizer: PreTrainedTokenizerFast,
        max_batch: int,
        max_queue: int,
    ):
        self.decoder, self.tiers, self.tokenizer = decoder, tiers, tokenizer
        self.max_batch = max_batch if decoder.can_batch else 1
        self.max_queue = max_queue
        self.waiting: deque[GenerationRequest] = deque()
        self.running: dict[int, GenerationRequest] = {}
        """Requests by the ids of their rows."""
        self.may_take = self.max_batch
        """Requests that this turn may still take from the queue."""
        self.generated = 0
        self.changed = threading.Condition()
        self.adapters = threading.Lock()
        """Lock held by whoever moves adapters."""
        self.stale: set[Path] = set()
        """Adapters to be read anew; the engine's thread lets go of what it has of them."""
        self.stopping = False
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def submit(self, request: GenerationRequest) -> None:
        """Let a request wait for its turn. Raises QueueFullError."""
        with self.changed:
            if len(self.waiting) >= self.max_queue:
                raise QueueFullError(f"{self.max_queue} requests wait already")
            self.waiting.append(request)
            self.changed.notify()

    def stop(self) -> None:
        with self.changed:
            self.stopping = True
            self.changed.notify()
        self.thread.join()

    def forget(self, folder: Path) -> None:
        """Have an adapter read anew, as its files have changed or it was taken away; nobody waits meanwhile."""
        with self.changed:
            self.stale.add(folder)
            self.changed.notify()

    def read_anew(self, folder: Path) -> None:
        """Read an adapter to the host in place of what is there of it. Raises ValueError for one not to be served."""
        if self.tiers is None:
            return
        factors = self.tiers.read(folder)
        with self.adapters:
            self.tiers.forget(folder)
            self.tiers.keep(folder, factors)

    def _forget_stale(self) -> None:
        with self.changed:
            stale, self.stale = self.stale, set()
        if self.tiers is not None:
            for folder in stale:
                self.tiers.forget(folder)

    def _run(self) -> None:
        while True:
            with self.changed:
                while not (self.stopping or self.waiting or self.running or self.stale):
                    self.changed.wait()
                if self.stopping:
                    return
            try:
                self.turn()
            except Exception as error:  # the thread goes on: the next request may be another
                logger.exception("an answer failed")
                self._fail_all(error)

    def turn(self) -> None:
        """Take in what waits, and give every running answer its next token. The engine's thread calls it.

        It takes up to `max_batch` requests: answers that end at once, one behind the other, would hold up the rest.
        """
        with self.adapters:
            self._forget_stale()
        self._drop_cancelled()
        self.may_take = self.max_batch
        while joining := self._joining():
            self.decoder.add(*joining)
            for row in joining:
                if not any(row is other for other in self.decoder.rows):
                    self._end(row)
        if self.running:
            for row in self.decoder.step():
                self._end(row)

    def _joining(self) -> list[RunningSequence]:
        """Return the next rows that can be taken in, as many as run well at once: of one adapter or of several."""
        rows: list[RunningSequence] = []
        tokens = 0
        while (request := self._next_request(rows, tokens)) is not None:
            with self.changed:
                self.waiting.popleft()
            if not request.cancelled:
                try:
                    row, slot = self._row(request), self._slot(request)
                except Exception as error:  # it is this request's, and no other's
                    if not isinstance(error, ValueError | OSError):
                        logger.exception("a request could not be taken in")
                    request.finished = True
                    request.take(Piece(error=error))
                else:
                    if slot is None:
                        with self.changed:
                            self.waiting.appendleft(request)
                        break
                    row.slot = slot
                    rows.append(row)
                    self.running[id(row)] = request
                    tokens += len(request.prompt)
            self.may_take -= 1
        return rows

    def _slot(self, request: GenerationRequest) -> int | None:
        """Return the number of the slot that a request's row goes through; None where it has to wait."""
        if request.folder is None or self.tiers is None:
            return -1
        with self.adapters:
            self._forget_stale()
            return self.tiers.acquire(request.folder)

    def _next_request(self, rows: Sequence[RunningSequence], tokens: int) -> GenerationRequest | None:
        """Return the request whose turn it is; None where it has to wait, or runs better after these rows.

        Prompts are padded to the longest one: what is padding stays below what is not.
        """
        with self.changed:
            if not self.waiting or len(self.running) >= self.max_batch or self.may_take == 0:
                return None
            request = self.waiting[0]
        padded = max(len(request.prompt), *(len(row.prompt) for row in rows)) * (len(rows) + 1) if rows else 0
        return request if padded <= min(PREFILL_TOKENS, 2 * (tokens + len(request.prompt))) else None

    def _row(self, request: GenerationRequest) -> RunningSequence:
        check_token_ids(self.decoder.model, [request.prompt])
        answer = AnswerText(self.tokenizer, request.before)
        return RunningSequence(
            request.prompt,
            request.sampling,
            lambda choice: self._take(request, answer, choice),
            top_logprobs=request.top_logprobs,
            wants_logprobs=request.wants_logprobs,
            on_failure=lambda error: self._fail(request, error),
        )

    def _fail(self, request: GenerationRequest, error: ValueError) -> None:
        """End one request without an answer."""
        request.finished = True
        request.take(Piece(error=error))

    def _take(self, request: GenerationRequest, answer: AnswerText, choice: Choice) -> bool:
        """Hand a token on as text; return whether the answer goes on."""
        self.generated += 1
        request.tokens.append(choice.token)
        if choice.token in request.end_ids:
            self._hand_on(request, choice, answer.whole, "stop")
            return False
        answer.add(choice.token)
        text = answer.whole
        if found := [at for stop in request.stops if (at := text.find(stop)) >= 0]:
            self._hand_on(request, choice, text[: min(found)], "stop")
            return False
        if len(request.tokens) >= request.sampling.max_new_tokens:
            self._hand_on(request, choice, text, "length")
            return False
        held = max((overlap(text, stop) for stop in request.stops), default=0)
        ready = text[: len(text) - held] if held else text
        self._hand_on(request, choice, ready if answer.is_ready else request.text, None)
        return True

    def _hand_on(self, request: GenerationRequest, choice: Choice, text: str, reason: str | None) -> None:
        piece, request.text = text[len(request.text) :], text if len(text) > len(request.text) else request.text
        request.finished = reason is not None
        request.take(Piece(piece, choice, reason))

    def _end(self, row: RunningSequence) -> None:
        self.running.pop(id(row))
        if row.slot >= 0 and self.tiers is not None:
            self.tiers.release(row.slot)

    def _drop_cancelled(self) -> None:
        gone = [row for row in self.decoder.rows if self.running[id(row)].cancelled]
        if gone:
            self.decoder.drop(gone)
            for row in gone:
                self._end(row)

    def _fail_all(self, error: Exception) -> None:
        """End every running request with an error, and start from an empty batch."""
        for request in self.running.values():
            if not request.finished:
                request.take(Piece(error=error))
        if self.tiers is not None:
            self.tiers.release_all()
        self.running.clear()
        self.decoder.clear()


def overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop text."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
