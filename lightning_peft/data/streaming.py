"""Training data that is read, tokenised and packed while it is trained on."""

import logging
import random
from collections.abc import Iterator
from itertools import count, islice
from typing import Any

from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from lightning_peft.data.audit import Audit
from lightning_peft.data.batch import Batch
from lightning_peft.data.collate import collate_units
from lightning_peft.data.config import DataConfig, RowKind
from lightning_peft.data.packing import MicroBatch, plan_micro_batches
from lightning_peft.data.samples import Samples, encode_rows
from lightning_peft.data.sources import iterate_rows

log = logging.getLogger(__name__)


class StreamedBatches(IterableDataset[Batch]):
    """Endless epochs over a source, an epoch at each `iter`, in windows of `data.shuffle_window` rows.

    Files come in random order, a window is shuffled and packed as a whole; both depend on seed and epoch only. Ranks
    take turns at the micro batches as in `MicroBatchSampler`, and a last round is filled up likewise. A window is
    found again by its first row, so the state is three numbers and may be loaded at another world size.

    `lookahead` is how many batches the consumer takes ahead of the one it works on. Lightning takes one where the
    length of an epoch is not known; the state is then that of the batch before.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        pad_token_id: int,
        seed: int,
        rank: int,
        world_size: int,
        lookahead: bool,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._pad_token_id = pad_token_id
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._lookahead = lookahead
        self._audit = Audit()
        self._state = self._saved_state = {"epoch": 0, "window_row": 0, "taken": 0}
        self._resuming = False

    def state_dict(self) -> dict[str, Any]:
        return dict(self._saved_state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = self._saved_state = dict(state)
        self._resuming = True

    def __iter__(self) -> Iterator[Batch]:
        # Runs at the first `next`.
        if not self._resuming and self._state["window_row"] + self._state["taken"] > 0:
            self._begin_epoch(self._state["epoch"] + 1)
        self._resuming = False
        epoch, start_row = self._state["epoch"], self._state["window_row"]
        index = self._state["taken"] + self._rank
        fill_in: tuple[Samples, MicroBatch] | None = None
        for window_row, samples, plan in self._windows(epoch, start_row):
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

    def _advance(self, epoch: int, window_row: int, taken: int) -> None:
        before, self._state = self._state, {"epoch": epoch, "window_row": window_row, "taken": taken}
        self._saved_state = before if self._lookahead else self._state

    def _begin_epoch(self, epoch: int) -> None:
        self._state = self._saved_state = {"epoch": epoch, "window_row": 0, "taken": 0}

    def _windows(self, epoch: int, start_row: int) -> Iterator[tuple[int, Samples, list[MicroBatch]]]:
        """First row, samples and micro batches of each window from the one that starts at `start_row`."""
        rows = iterate_rows(self._config, "train", random.Random(f"{self._seed} {epoch}"))
        next(islice(rows, start_row, start_row), None)
        row = start_row
        self._audit = Audit()
        group = (self._config.rows or RowKind.answers).samples
        for number in count(1):
            window = list(islice(rows, self._config.shuffle_window))
            if not window:
                self._report(epoch)
                return
            samples = Samples.of(encode_rows(window, self._config, self._tokenizer, self._audit), group)
            if number > 1 and number.bit_count() == 1:  # rarer and rarer: an epoch may be days away
                self._report(epoch)
            plan = plan_micro_batches(
                samples.unit_lengths,
                self._config.max_length * group,
                self._config.micro_batch_size,
                self._config.packing,
                random.Random(f"{self._seed} {epoch} {row}"),
            )
            if plan:
                yield row, samples, plan
            row += len(window)

    def _report(self, epoch: int) -> None:
        if self._rank == 0:
            for line in self._audit.warnings():
                log.warning("training data, epoch %d, %d rows read: %s", epoch, self._audit.rows, line)

    def _batch(self, samples: Samples, rows: MicroBatch, filler: bool = False) -> Batch:
        packed = [[samples.unit(index) for index in row] for row in rows]
        return collate_units(packed, self._pad_token_id, self._config.max_length, self._config.packing, filler)
