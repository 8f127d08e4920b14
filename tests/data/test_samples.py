import tracemalloc
from collections.abc import Iterator

import pytest

from lightning_peft.data.audit import Audit, DuplicateBosError, preview
from lightning_peft.data.chat import Encoded, encode
from lightning_peft.data.config import DataConfig, OnBadRow, OnTooLong
from lightning_peft.data.conversation import BadRow, Message, Row
from lightning_peft.data.samples import encode_rows
from lightning_peft.data.token_store import Samples

WORDS = "one two three four " * 10
LONG = {"prompt": "Hi", "completion": WORDS}
SHORT = {"prompt": "Hi", "completion": "Hello there"}


def run(rows, tokenizer, **options):
    audit = Audit()
    numbered = [row if isinstance(row, BadRow) else Row(row, f"row {i}") for i, row in enumerate(rows)]
    return list(encode_rows(numbered, DataConfig(**options), tokenizer, audit)), audit


def test_audit_counts_by_hand(chatml):
    """ChatML with the default system prompt: 13 + 3 tokens before the answer, Hello, there, end, newline."""
    _, audit = run([SHORT, SHORT], chatml)
    assert (audit.rows, audit.samples, audit.tokens, audit.supervised, audit.ended) == (2, 2, 40, 6, 2)
    assert audit.lines() == ["2 samples of 2 rows, 40 tokens, 6 trained (15.0%)"]
    assert audit.warnings() == []


def test_truncation_cuts_the_end_and_is_reported(chatml):
    whole = encode([Message("user", "Hi"), Message("assistant", WORDS)], chatml)
    [sample, short], audit = run([LONG, SHORT], chatml, max_length=24)
    assert sample == Encoded(whole.input_ids[:24], whole.labels[:24], ends=False, truncated=True)
    assert (audit.truncated, audit.ended, audit.tokens) == (1, 1, 44)
    lost = len([label for label in whole.labels[24:] if label != -100])
    assert audit.warnings() == [
        f"1 answers are cut at data.max_length: {lost} of their tokens and their end are not trained"
    ]


def test_long_rows_are_skipped_on_request_and_reported(chatml):
    samples, audit = run([LONG, SHORT, LONG], chatml, max_length=24, on_too_long=OnTooLong.skip)
    assert len(samples) == 1
    assert audit.warnings() == ["2 rows over data.max_length are skipped (data.on_too_long=skip)"]


def test_long_row_stops_on_request(chatml):
    with pytest.raises(ValueError, match=r"row 1: \d+ tokens, more than data.max_length=24; raise it, or choose"):
        run([SHORT, LONG], chatml, max_length=24, on_too_long=OnTooLong.error)


@pytest.mark.parametrize("max_length", [2, 7, 40, 41, 100])
def test_split_text_trains_each_token_once(chatml, max_length):
    whole = encode([Message("text", WORDS)], chatml)
    samples, audit = run([{"text": WORDS}], chatml, max_length=max_length, on_too_long=OnTooLong.split)
    assert all(2 <= len(sample.input_ids) <= max_length for sample in samples)
    assert [label for sample in samples for label in sample.labels[1:]] == whole.input_ids[1:]
    assert [sample.ends for sample in samples] == [False] * (len(samples) - 1) + [True]
    assert audit.split_long == (len(samples) > 1)


def test_only_text_can_be_split(chatml):
    with pytest.raises(ValueError, match="data.on_too_long=split: only plain text can be split, these rows are prompt"):
        run([SHORT], chatml, on_too_long=OnTooLong.split)


def test_prompt_that_fills_the_sample_is_an_error(chatml):
    with pytest.raises(BadRow, match="^row 1: expected an answer that begins before data.max_length, got .*24 tokens"):
        run([SHORT, {"prompt": WORDS, "completion": "Hi"}], chatml, max_length=24)


def test_bad_rows_are_skipped_and_the_first_three_shown(chatml):
    bad = [{"prompt": "Hi", "completion": number} for number in range(5)]
    broken = BadRow("row 7", "a JSON object", "{")
    samples, audit = run([broken, SHORT, *bad], chatml, on_bad_row=OnBadRow.skip)
    assert (len(samples), audit.rows, audit.bad_rows) == (1, 7, 6)
    [line] = audit.warnings()
    assert line.startswith(
        "6 of 7 rows are skipped (data.on_bad_row=skip): row 7: expected a JSON object, got '{'; row 2,"
    )
    assert line.count("row ") == 3


def test_bad_row_stops_by_default(chatml):
    with pytest.raises(BadRow, match="^row 1, column 'completion': expected non-empty text, got 3"):
        run([SHORT, {"prompt": "Hi", "completion": 3}], chatml)


BEGINS_TWICE = "{{ bos_token }}{% for message in messages %}{{ message.content + eos_token }}{% endfor %}"


def test_duplicate_bos_is_an_error(make_tokenizer):
    tokenizer = make_tokenizer("{{ bos_token }}" + BEGINS_TWICE)
    with pytest.raises(DuplicateBosError, match="^row 0: the sample starts with two BOS tokens '<s>'"):
        run([SHORT], tokenizer)
    with pytest.raises(DuplicateBosError, match="^row 0: "):
        run([{"text": "<s>Hi"}], make_tokenizer(adds_bos=True))
    run([SHORT], make_tokenizer(BEGINS_TWICE))


def test_end_never_trained_is_reported_with_the_reason(make_tokenizer):
    template = "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    _, audit = run([SHORT], make_tokenizer(template))
    assert audit.warnings() == [
        "no end token is trained, so generation will not learn to stop: "
        "the chat template puts no special token after an answer, or the tokenizer has no EOS"
    ]


def test_end_never_trained_because_all_are_cut(chatml):
    _, audit = run([LONG], chatml, max_length=24)
    assert audit.warnings()[1].endswith("will not learn to stop: every answer is cut at data.max_length")


def test_preview_highlights_what_is_trained(chatml):
    [sample], _ = run([SHORT], chatml)
    text = preview(sample, chatml)
    trained = [text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style)]
    assert trained == ["Hello there<|im_end|>"]
    assert text.plain == chatml.decode(sample.input_ids)
    marked = preview(sample, chatml, has_colours=False).plain
    assert "[[Hello there<|im_end|>]]" in marked and marked.replace("[[", "").replace("]]", "") == text.plain


def test_samples_are_kept_exactly():
    encoded = [Encoded([1, 2, 3], [-100, 2, 3], True), Encoded([4], [-100], False), Encoded([5, 6], [-100, -100], True)]
    samples = Samples.of(encoded)
    assert samples.lengths == [3, 1, 2]
    assert [(samples[i].input_ids, samples[i].labels) for i in range(3)] == [(e.input_ids, e.labels) for e in encoded]


def test_fingerprint_changes_with_token_label_and_boundary():
    def fingerprint(*samples):
        return Samples.of([Encoded(ids, labels, True) for ids, labels in samples]).fingerprint

    variants = {
        fingerprint(([1, 2], [1, 2]), ([3], [3])),
        fingerprint(([1, 2], [1, 2]), ([4], [4])),
        fingerprint(([1, 2], [-100, 2]), ([3], [3])),
        fingerprint(([1], [1]), ([2, 3], [2, 3])),
    }
    assert len(variants) == 4
    assert fingerprint(([1], [1])) == fingerprint(([1], [1]))


def test_what_a_teacher_reads_grows_in_arrays_too() -> None:
    """Peaks of memory a token: arrays of five bytes, up to twice that while they grow, and no lists of 60."""
    count, length = 200, 500

    def rows() -> Iterator[Encoded]:
        for number in range(count):
            ids = list(range(1000 + number, 1000 + number + length))
            theirs = Encoded(ids, ids, ends=True, kinds=bytes(length))
            yield Encoded(ids, ids, ends=True, kinds=bytes(length), taught=theirs)

    tracemalloc.start()
    try:
        samples = Samples.of(rows())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert samples.taught is not None and samples.taught.lengths == samples.lengths
    assert peak / (2 * count * length) < 12
