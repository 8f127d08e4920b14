"""Training data that is read, tokenised and packed while it is trained on."""

import logging
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import count, islice
from typing import Any

from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from lightning_peft.data.audit import Audit
from lightning_peft.data.batch import Batch
from lightning_peft.data.chat import Encoded
from lightning_peft.data.collate import CollatedBatches
from lightning_peft.data.config import DataConfig, RowKind
from lightning_peft.data.conversation import BadRow, Row
from lightning_peft.data.formats import RowReader
from lightning_peft.data.mixture import MixedSource, naming
from lightning_peft.data.packing import MicroBatch, plan_micro_batches
from lightning_peft.data.sampler import Request
from lightning_peft.data.samples import ROWS_AT_ONCE, encode_rows, reader_of
from lightning_peft.data.sources import iterate_rows
from lightning_peft.data.token_store import Samples

log = logging.getLogger(__name__)


class Windows(ABC):
    """The windows of a stream: samples that are shuffled and packed together, found again by where one begins."""

    start: Any
    """The place where the first window of an epoch begins."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        reports: bool,
        check: Callable[[Samples, Iterable[Audit]], None],
        listed: Collection[tuple[str, str]] = (),
    ) -> None:
        """Keep the options. reports: whether to say what an audit finds on the way; check: raises where a window cannot
        be trained; listed: names of what nobody reads that were said before, each with its source.
        """
        self._config = config
        self._listed = set(listed)
        self._check = check
        self._tokenizer = tokenizer
        self._seed = seed
        self._reports = reports
        self._group = (config.rows or RowKind.answers).samples

    @abstractmethod
    def since(self, epoch: int, begin: Any) -> Iterator[tuple[Any, Samples, list[MicroBatch]]]:
        """Iterate over the windows from place `begin` on: where each begins, its samples and its micro batches."""

    def _plan(self, samples: Samples, rng: random.Random, audits: Iterable[Audit]) -> list[MicroBatch]:
        self._check(samples, audits)
        config = self._config
        capacity = config.max_length * self._group
        return plan_micro_batches(samples.unit_lengths, capacity, config.micro_batch_size, config.packing, rng)

    def _report_unread(self, audit: Audit, where: str, source: str = "") -> None:
        """Say, once each, which columns and keys that hold ids and the like are there and not read."""
        new = {name: count for name, count in audit.listed.items() if (source, name) not in self._listed}
        self._listed |= {(source, name) for name in new}
        if new and self._reports:
            names = ", ".join(f"{name} ({count:,} rows)" for name, count in new.items())
            log.info("training data, %s, %d rows read: not read: %s", where, audit.rows, names)

    def _report(self, audit: Audit, where: str) -> None:
        if self._reports:
            for line in audit.warnings():
                log.warning("training data, %s, %d rows read: %s", where, audit.rows, line)


class RowWindows(Windows):
    """Windows of `data.shuffle_window` rows of one source, found by their first row. An epoch is all of them."""

    start = 0

    @cached_property
    def _reader(self) -> RowReader | None:
        return reader_of(self._config, "train")

    def since(self, epoch: int, begin: int) -> Iterator[tuple[int, Samples, list[MicroBatch]]]:
        rows = iterate_rows(self._config, "train", random.Random(f"{self._seed} {epoch}"))
        next(islice(rows, begin, begin), None)
        audit = Audit()
        for number in count(1):
            window = list(islice(rows, self._config.shuffle_window))
            if not window:
                self._report(audit, f"epoch {epoch}")
                return
            encoded = encode_rows(window, self._config, self._tokenizer, audit, reader=self._reader)
            samples = Samples.of(encoded, self._group)
            self._report_unread(audit, f"epoch {epoch}")
            if number > 1 and number.bit_count() == 1:  # rarer and rarer: an epoch may be days away
                self._report(audit, f"epoch {epoch}")
            if plan := self._plan(samples, random.Random(f"{self._seed} {epoch} {begin}"), [audit]):
                yield begin, samples, plan
            begin += len(window)


class MixedWindows(Windows):
    """Windows of `data.shuffle_window` samples of a mixture, without an end.

    The next sample is of the source that has come furthest short of its share, so shares hold to a sample at any time.
    A window begins at a place in each source: the pass, the first row of a block that was tokenised together, the
    samples of the block that were taken, and the tokens taken since the run began.
    """

    start: tuple[()] = ()

    def __init__(
        self,
        config: DataConfig,
        sources: Sequence[MixedSource],
        shares: Sequence[float],
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        reports: bool,
        check: Callable[[Samples, Iterable[Audit]], None],
        listed: Collection[tuple[str, str]] = (),
    ) -> None:
        super().__init__(config, tokenizer, seed, reports, check, listed)
        self._drawn_from = [(source, share) for source, share in zip(sources, shares, strict=True) if share > 0]

    def since(self, epoch: int, begin: Any) -> Iterator[tuple[Any, Samples, list[MicroBatch]]]:
        streams = [
            _SourceStream(source, share, self._tokenizer, f"{self._seed} {epoch}", self._group, place)
            for (source, share), place in zip(
                self._drawn_from, begin or [(0, 0, 0, 0)] * len(self._drawn_from), strict=True
            )
        ]
        for number in count(1):
            begin = tuple(stream.place for stream in streams)
            drawn: list[Encoded] = []
            while len(drawn) < self._config.shuffle_window * self._group:
                drawn += min((stream for stream in streams if stream.has_more()), key=lambda one: one.progress).take()
            samples = Samples.of(drawn, self._group)
            for stream in streams:
                self._report_unread(stream.audit, stream.name, stream.name)
            if number > 1 and number.bit_count() == 1:
                for stream in streams:
                    self._report(stream.audit, stream.name)
            audits = [stream.audit for stream in streams]
            yield begin, samples, self._plan(samples, random.Random(f"{self._seed} {epoch} {begin}"), audits)


class _SourceStream:
    """One source of a mixture, pass after pass."""

    def __init__(
        self,
        source: MixedSource,
        share: float,
        tokenizer: PreTrainedTokenizerBase,
        seed: str,
        group: int,
        place: tuple[int, int, int, int],
    ) -> None:
        self.name = source.name
        self.audit = Audit()
        self._source = source
        self._share = share
        self._tokenizer = tokenizer
        self._seed = seed
        self._group = group
        with naming(source.name):
            self._reader = reader_of(source.config, "train")
        self._pass, self._row, self._taken, self._tokens = place
        self._rows = self._rows_of_pass()
        next(islice(self._rows, self._row, self._row), None)
        self._block: list[Encoded] = []
        self._block_rows = 0
        self._found = self._row > 0 or self._taken > 0
        """True where this pass, or the one before, had a sample."""
        if self._taken:
            self._read_block()

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Return the place that the next sample comes from."""
        return self._pass, self._row, self._taken, self._tokens

    @property
    def progress(self) -> float:
        """Return the tokens taken for each token of the source's share."""
        return self._tokens / self._share

    def has_more(self) -> bool:
        """Return whether there is a next sample, and read on for it. Raises ValueError for a source without any."""
        while self._taken >= len(self._block):
            if self._source.max_epochs is not None and self._pass >= self._source.max_epochs:
                return False
            self._row, self._taken = self._row + self._block_rows, 0
            self._read_block()
            if self._block_rows == 0:
                if not self._found:
                    raise ValueError(f"data.sources.{self.name}: nothing to train on in {self.audit.rows} rows")
                self._pass, self._row, self._found = self._pass + 1, 0, False
                self._rows = self._rows_of_pass()
        return True

    def take(self) -> list[Encoded]:
        """Return the samples of the next unit."""
        unit = self._block[self._taken : self._taken + self._group]
        self._taken += self._group
        self._tokens += sum(len(sample.input_ids) for sample in unit)
        return unit

    def _read_block(self) -> None:
        config = self._source.config
        with naming(self.name):
            rows = list(islice(self._rows, min(ROWS_AT_ONCE, config.shuffle_window)))
            self._block = list(encode_rows(rows, config, self._tokenizer, self.audit, reader=self._reader))
        self._block_rows = len(rows)
        self._found = self._found or bool(self._block)

    def _rows_of_pass(self) -> Iterator[Row | BadRow]:
        return iterate_rows(self._source.config, "train", random.Random(f"{self._seed} {self.name} {self._pass}"))


class StreamedBatches(IterableDataset[Batch]):
    """Endless epochs over a source, an epoch at each `iter`, or one without an end over a mixture, in windows.

    Files come in random order, a window is shuffled and packed as a whole; both depend on seed and epoch only. Ranks
    take turns at the micro batches as in `MicroBatchSampler`, and a last round is filled up likewise. The state is
    the epoch, where the window begins, and a number, and may be loaded at another world size.

    `lookahead` is how many batches the consumer takes ahead of the one it works on. Lightning takes one where the
    length of an epoch is not known; the state is then that of the batch before.
    """

    def __init__(
        self, windows: Windows, config: DataConfig, pad_token_id: int, rank: int, world_size: int, lookahead: bool
    ) -> None:
        self._windows = windows
        self._config = config
        self._pad_token_id = pad_token_id
        self._rank = rank
        self._world_size = world_size
        self._lookahead = lookahead
        self._state = self._saved_state = {"epoch": 0, "window_row": windows.start, "taken": 0}
        self._resuming = False

    def state_dict(self) -> dict[str, Any]:
        return dict(self._saved_state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = self._saved_state = dict(state)
        self._resuming = True

    def __iter__(self) -> Iterator[Batch]:
        # This runs at the first `next`.
        has_begun = self._state["window_row"] != self._windows.start or self._state["taken"] > 0
        if not self._resuming and has_begun:
            self._begin_epoch(self._state["epoch"] + 1)
        self._resuming = False
        epoch, begin = self._state["epoch"], self._state["window_row"]
        index = self._state["taken"] + self._rank
        fill_in: tuple[Samples, MicroBatch] | None = None
        for window_row, samples, plan in self._windows.since(epoch, begin):
            while index < len(plan):
                self._advance(epoch, window_row, index - self._rank + self._world_size)
                yield self._batch(samples, plan[index])
                index += self._world_size
            index -= len(plan)
            fill_in = (samples, plan[0][:1])
        if fill_in is not None and index - self._rank < 0:
            self._advance(epoch, window_row, index - self._rank + len(plan) + self._world_size)
            yield self._batch(*fill_in, filler=True)
        self._begin_epoch(epoch + 1)

    def _advance(self, epoch: int, window_row: Any, taken: int) -> None:
        before, self._state = self._state, {"epoch": epoch, "window_row": window_row, "taken": taken}
        self._saved_state = before if self._lookahead else self._state

    def _begin_epoch(self, epoch: int) -> None:
        self._state = self._saved_state = {"epoch": epoch, "window_row": self._windows.start, "taken": 0}

    def _batch(self, samples: Samples, rows: MicroBatch, filler: bool = False) -> Batch:
        return CollatedBatches(samples, self._config, self._pad_token_id)[Request(rows, filler)]
