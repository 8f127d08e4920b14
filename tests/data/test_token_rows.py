"""Rows that were tokenised before."""

import json
from itertools import islice

import pytest
import torch

from lightning_peft.data.config import DataConfig, OnBadRow, OnTooLong
from lightning_peft.data.conversation import BadRow
from lightning_peft.data.datamodule import SFTDataModule
from lightning_peft.data.samples import make_samples

ROWS = [{"prompt": f"Hi {n}", "completion": "one " * (1 + n % 7)} for n in range(40)]


def samples(path, tokenizer, **options):
    found, audit = make_samples(DataConfig(train_path=path, validation_fraction=0.0, **options), "train", tokenizer)
    return [found[index] for index in range(len(found))], audit


@pytest.fixture
def tokenised(chatml, write_jsonl):
    """Return the rows, and the same rows as their own tokens and labels."""
    plain = write_jsonl(ROWS, "plain.jsonl")
    encoded, _ = samples(plain, chatml)
    rows = [{"input_ids": s.input_ids, "labels": s.labels, "attention_mask": [1] * len(s.labels)} for s in encoded]
    return plain, write_jsonl(rows, "tokens.jsonl")


@pytest.mark.parametrize("options", [{}, {"streaming": True, "shuffle_window": 7}, {"packing": False}])
def test_batches_are_those_of_the_rows_they_were_made_from(tokenised, chatml, options, tmp_path):
    batches = []
    for path in tokenised:
        config = DataConfig(train_path=path, max_length=64, cache_dir=str(tmp_path), **options)
        for _ in range(2):  # the second time from the cache
            module = SFTDataModule(config, chatml, 0)
            module.setup()
            batches.append([(b.input_ids, b.labels, b.cu_seqlens) for b in module.train_dataloader()])
    for other in batches[1:]:
        for mine, theirs in zip(batches[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_audit_counts_labels_and_ends(tokenised, chatml):
    (_, plain), (_, tokens) = (samples(path, chatml) for path in tokenised)
    assert tokens.format == "tokens" and tokens.warnings() == []
    assert (tokens.supervised, tokens.ended, tokens.kinds["end"]) == (plain.supervised, plain.ended, plain.kinds["end"])


def test_without_labels_every_token_is_trained(chatml, write_jsonl):
    path = write_jsonl([{"input_ids": [5, 6, 7]}, {"input_ids": "[5, 6]"}])
    found, audit = samples(path, chatml)
    assert [sample.labels for sample in found] == [[-100, 6, 7], [-100, 6]]
    assert audit.supervised == 3


def test_weights_scale_the_loss_and_zero_trains_nothing(chatml, write_jsonl):
    rows = [{"input_ids": [5, 6, 7, 8], "weights": [1, 0.5, 0, 2]}, {"input_ids": [5, 6], "weight": 3}]
    found, _ = samples(write_jsonl(rows), chatml)
    assert found[0].labels == [-100, 6, -100, 8] and found[0].weights == [1, 0.5, 0, 2]
    assert found[1].weights == [3, 3]


def test_long_rows_are_cut_or_split(chatml, write_jsonl):
    path = write_jsonl([{"input_ids": list(range(10, 21))}])
    cut, audit = samples(path, chatml, max_length=4)
    assert [sample.input_ids for sample in cut] == [[10, 11, 12, 13]] and audit.lost == 7
    split, _ = samples(path, chatml, max_length=4, on_too_long=OnTooLong.split)
    assert [label for sample in split for label in sample.labels if label != -100] == list(range(11, 21))


BAD = {
    "empty": ({"input_ids": []}, "column 'input_ids': expected at least one token"),
    "null": ({"input_ids": None}, "column 'input_ids': expected a list of token ids"),
    "text": ({"input_ids": "Hi"}, "expected a list of numbers"),
    "floats": ({"input_ids": [1.0, 2.0]}, "expected a list of whole numbers"),
    "booleans": ({"input_ids": [True, 2]}, "expected a list of whole numbers"),
    "nested": ({"input_ids": [[1, 2]]}, "expected a list of whole numbers"),
    "negative": ({"input_ids": [4, -1]}, "expected token ids from 0 on, got -1"),
    "huge": ({"input_ids": [4, 2**31]}, "expected token ids from 0 on, got 2147483648"),
    "fewer labels": ({"input_ids": [4, 5], "labels": [4]}, "column 'labels': expected as many as the 2 input_ids"),
    "shifted": ({"input_ids": [4, 5, 6], "labels": [5, 6, -100]}, r"the token itself, 4, at place 0 \(labels are not"),
    "nothing": ({"input_ids": [4, 5], "labels": [-100, -100]}, "expected at least one token to train"),
    "padded": ({"input_ids": [4, 5, 0], "attention_mask": [1, 1, 0]}, "'attention_mask': expected ones only"),
    "short mask": ({"input_ids": [4, 5], "attention_mask": [1]}, "column 'attention_mask': expected as many as"),
    "several samples": ({"input_ids": [4, 5], "position_ids": [0, 0]}, "column 'position_ids': expected 0, 1, 2"),
    "negative weight": ({"input_ids": [4, 5], "weights": [1, -1]}, "column 'weights': expected numbers from 0 on"),
    "few weights": ({"input_ids": [4, 5], "weights": [1]}, "column 'weights': expected as many as the 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_row_is_named_and_can_be_skipped(case, chatml, write_jsonl):
    row, message = BAD[case]
    path = write_jsonl([{"input_ids": [5, 6]}, row])
    with pytest.raises(BadRow, match=f"rows.jsonl line 2.*{message}"):
        samples(path, chatml)
    found, audit = samples(path, chatml, on_bad_row=OnBadRow.skip)
    assert len(found) == audit.bad_rows == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_token_beyond_the_embedding_is_an_error(chatml, write_jsonl, streaming):
    """The tokenizer has it, so no row is at fault: model and tokenizer do not belong together."""
    path = write_jsonl([*[{"input_ids": [5, 6]}] * 20, {"input_ids": [5, 320]}])
    config = DataConfig(train_path=path, validation_fraction=0.0, cache_dir=None, streaming=streaming, shuffle_window=9)
    module = SFTDataModule(config, chatml, 0, vocabulary=300)
    with pytest.raises(
        ValueError, match="rows.jsonl line 21: token '.*' has the id 320, the model has embeddings for 300"
    ):
        module.setup()
        list(module.train_dataloader())


@pytest.mark.parametrize("streaming", [False, True])
def test_token_that_the_tokenizer_does_not_have_is_the_fault_of_its_row(chatml, write_jsonl, streaming):
    path = write_jsonl([*[{"input_ids": [5, 6]}] * 20, {"input_ids": [5, 999]}, {"input_ids": [5, 7]}])
    options = {"validation_fraction": 0.0, "cache_dir": None, "streaming": streaming, "shuffle_window": 9}
    module = SFTDataModule(DataConfig(train_path=path, **options), chatml, 0, vocabulary=900)
    message = f"rows.jsonl line 21: column 'input_ids': a token has the id 999, and the tokenizer has {len(chatml)} tok"
    with pytest.raises(BadRow, match=message):
        module.setup()
        list(module.train_dataloader())
    config = DataConfig(train_path=path, on_bad_row=OnBadRow.skip, packing=False, micro_batch_size=1, **options)
    module = SFTDataModule(config, chatml, 0, vocabulary=900)
    module.setup()
    tokens = [batch.input_ids.flatten()[:2].tolist() for batch in islice(module.train_dataloader(), 21)]
    assert sorted(tokens) == [[5, 6]] * 20 + [[5, 7]]


def test_column_beside_them_is_not_silent(chatml, write_jsonl):
    path = write_jsonl([{"input_ids": [5, 6], "mask": [0, 1]}])
    with pytest.raises(ValueError, match="nobody reads column 'mask'"):
        samples(path, chatml)


def test_options_of_turns_are_said_to_do_nothing(chatml, write_jsonl, caplog):
    path = write_jsonl([{"input_ids": [5, 6]}])
    config = DataConfig(train_path=path, system_prompt="Be brief", validation_fraction=0.0, cache_dir=None)
    SFTDataModule(config, chatml, 0).setup()
    assert "data.system_prompt: rows of tokens have no turns" in caplog.text


def test_file_of_rows_as_json_array(chatml, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"input_ids": [5, 6]}, {"input_ids": [7, 8]}]))
    assert len(samples(str(path), chatml)[0]) == 2


@pytest.mark.parametrize(
    "row", [{"weights": [1, 1e39]}, {"weights": [1, 10**400]}, {"weights": [1, 1e30], "weight": 1e30}]
)
def test_weights_beyond_fp32_are_refused(chatml, write_jsonl, row):
    path = write_jsonl([{"input_ids": [5, 6], **row}])
    with pytest.raises(BadRow, match=r"column 'weights': expected numbers from 0 on, at most 3.4e\+38"):
        samples(path, chatml)
