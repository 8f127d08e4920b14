"""A stream reads every window alike, and says of later ones what it says of the first."""

import logging
from itertools import islice

import pytest

from lightning_peft.data.config import DataConfig, OnBadRow
from lightning_peft.data.conversation import BadRow
from lightning_peft.data.datamodule import SFTDataModule
from lightning_peft.data.samples import UnreadError

PAIR, TEXT, STRAY = {"prompt": "Hi", "completion": "one"}, {"text": "two three"}, {"notes": "x"}
SHARE = {"validation_fraction": 0.0, "cache_dir": None, "max_length": 64, "micro_batch_size": 2, "shuffle_window": 10}


def module_of(path, tokenizer, **options):
    config = DataConfig(train_path=path, streaming=True, **(SHARE | options))
    module = SFTDataModule(config, tokenizer, 0)
    module.setup()
    return module


def test_rows_of_another_format_in_a_later_window_are_bad_rows(chatml, write_jsonl):
    path = write_jsonl([PAIR] * 20 + [TEXT] * 20)
    with pytest.raises(BadRow, match="line 21: expected a column 'prompt', got 'text'"):
        list(module_of(path, chatml).train_dataloader())
    batches = list(module_of(path, chatml, on_bad_row=OnBadRow.skip).train_dataloader())
    plain = list(module_of(write_jsonl([PAIR] * 20, "plain.jsonl"), chatml).train_dataloader())
    assert sum(batch.num_tokens for batch in batches) == sum(batch.num_tokens for batch in plain)


def test_sources_of_a_mixture_read_every_window_alike(chatml, write_jsonl):
    path = write_jsonl([PAIR] * 300 + [TEXT] * 20)
    sources = {"a": {"train_path": path, "weight": 1}}
    module = module_of(None, chatml, sources={**sources, "b": {"train_path": path, "weight": 0}})
    with pytest.raises(BadRow, match="data.sources.a: .*line 301: expected a column 'prompt'"):
        list(islice(module.train_dataloader(), 1000))


def test_first_window_without_a_usable_row_is_no_end(chatml, write_jsonl):
    path = write_jsonl([STRAY] * 30 + [PAIR] * 20)
    module = module_of(path, chatml, on_bad_row=OnBadRow.skip)
    assert (module.train_audit.rows, module.train_audit.bad_rows, module.train_audit.samples) == (40, 30, 10)
    whole = module_of(path, chatml, on_bad_row=OnBadRow.skip, shuffle_window=1000)
    batches = list(module.train_dataloader())
    assert sum(batch.num_tokens for batch in batches) == whole.train_audit.tokens
    with pytest.raises(ValueError, match="data.format=auto: no known shape of row, the columns are notes"):
        module_of(write_jsonl([STRAY] * 30, "stray.jsonl"), chatml, on_bad_row=OnBadRow.skip)


def test_what_later_windows_leave_unread_is_said_once_or_stops_the_run(chatml, write_jsonl, caplog):
    caplog.set_level(logging.INFO)
    rows = [PAIR | {"id": "a"}] * 10 + [PAIR | {"id": "b", "url": "c"}] * 20
    list(module_of(write_jsonl(rows), chatml).train_dataloader())
    said = [message for message in caplog.messages if "not read: " in message]
    assert said == [
        "training data: not read: column 'id' (10 rows)",
        "training data, epoch 0, 20 rows read: not read: column 'url' (10 rows)",
    ]
    path = write_jsonl([PAIR] * 10 + [PAIR | {"images": ["c.png"]}] * 10, "images.jsonl")
    with pytest.raises(UnreadError, match="column 'images'"):
        list(module_of(path, chatml).train_dataloader())
