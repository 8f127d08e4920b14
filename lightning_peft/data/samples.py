"""From rows to tokenised samples, under the options for bad and too long rows."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice, zip_longest
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_peft.data.audit import Audit, DuplicateBosError, check_sample
from lightning_peft.data.batch import IGNORED_LABEL
from lightning_peft.data.chat import Encoded, Encoder, Outcome, cut_to, encoder_of, end_token_ids
from lightning_peft.data.columns import WITHOUT_TURNS, RowReader
from lightning_peft.data.config import DataConfig, Layout, OnBadRow, OnTooLong, RowKind
from lightning_peft.data.conversation import BadRow, Conversation, Row
from lightning_peft.data.mixture import MixedSource, naming, sources_of
from lightning_peft.data.preferences import Standing
from lightning_peft.data.prerendered import RenderedText
from lightning_peft.data.row_reader import row_reader
from lightning_peft.data.sources import file_count, iterate_rows
from lightning_peft.data.template import ChatTemplate
from lightning_peft.data.token_rows import sample_of
from lightning_peft.data.token_store import Samples, kinds_of
from lightning_peft.data.too_long import fit
from lightning_peft.progress import Part

ROWS_AT_ONCE = 256
"""Rows tokenised in one call, which the tokenizer spreads over the cores; their shapes decide the format."""


_QUOTED = re.compile(r"""(['"])(.*)\1""")
"""The name in "column 'name'"."""
_PLAIN = re.compile(r"[\w.-]+")
"""Names that need no quotes on the command line."""


class UnreadError(ValueError):
    """Columns, or keys of turns, that nobody reads and that may hold what was to be trained on."""


def make_samples(config: DataConfig, split: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Samples, Audit]:
    """The tokenised rows of a split, of the first window of the training rows when streaming, and their counts.

    Raises `BadRow`, `UnreadError`, ValueError for options that do not fit the rows, `ChatTemplateError`,
    `DuplicateBosError`.
    """
    rows = iterate_rows(config, split)
    if config.streaming and split == "train":
        rows = islice(rows, config.shuffle_window)
    audit = Audit(files=file_count(config, split))
    with Part(f"tokenising the {split} rows") as part:
        group = (config.rows or RowKind.answers).samples
        return Samples.of(encode_rows(part.counting(rows), config, tokenizer, audit), group), audit


def encode_rows(
    rows: Iterable[Row | BadRow], config: DataConfig, tokenizer: PreTrainedTokenizerBase, audit: Audit
) -> Iterator[Encoded]:
    """Samples of the rows in their order, counted in `audit`.

    Raises `BadRow`, `UnreadError`, ValueError for options that do not fit the rows, `ChatTemplateError`,
    `DuplicateBosError`.
    """
    encoder = encoder_of(config, tokenizer)
    rows = iter(rows)
    reader: RowReader | None = None
    refused: ValueError | None = None
    template: ChatTemplate | None = None
    rendered: RenderedText | None = None
    unread: Counter[str] = Counter()
    before: Conversation | None = None
    while several := list(islice(rows, ROWS_AT_ONCE)):
        if reader is None:
            reader, refused = _find_reader(several, config)
            if reader is not None:
                audit.format = reader.format
        read: list[tuple[str, Conversation]] = []
        for row in several:
            audit.rows += 1
            try:
                if isinstance(row, BadRow):
                    raise row
                if reader is None:
                    raise BadRow.because(row.origin, str(refused))
                conversation = _read(reader, row)
                audit.count_ignored(reader.ignores(row))
                if config.layout is Layout.chat and reader.format not in WITHOUT_TURNS:
                    if template is None or rendered is None:  # once: the tokenizer's own is asked for each time
                        template = encoder.template
                        rendered = RenderedText(tokenizer, template, encoder.end_token_ids())
                    rendered.refuse([*conversation, *(conversation.rejected or ())], row.origin)
                    not_written = unwritten(conversation, template)
                    unread.update(name for name, is_id in not_written if not is_id)
                    audit.count_listed(name for name, is_id in not_written if is_id)
                unread.update(conversation.unread)
                audit.count_listed(conversation.listed)
                if conversation.trailing:
                    audit.count_listed(["turns after the last answer"])
                audit.count_tools(conversation.tools)
                read.append((row.origin, conversation))
            except BadRow as error:
                _refuse(error, config, audit)
        if not unread:  # else only the rest of them is counted
            yield from _encode(read, config, tokenizer, encoder, audit, before)
        before = read[-1][1] if read else before
    if unread:
        raise UnreadError(_unread_message(unread, audit.rows))
    if refused is not None and reader is None and audit.rows == audit.bad_rows:
        raise refused


def unwritten(conversation: Conversation, template: ChatTemplate) -> list[tuple[str, bool]]:
    """Name the keys of turns that the chat template does not write, and whether they only identify a call."""
    found: dict[str, bool] = {}
    for message in chain(conversation, conversation.rejected or ()):
        for key in ("name", "tool_call_id"):
            if getattr(message, key) is not None and not template.writes(message.role, key):
                found[f"key {key!r} of a turn of the {message.role}"] = message.role == "tool"
    return list(found.items())


def _find_reader(rows: Iterable[Row | BadRow], config: DataConfig) -> tuple[RowReader | None, ValueError | None]:
    """The reader that fits most of the rows; the error of the first row where none fits any.

    With `data.on_bad_row=error` the first row that was read decides.
    """
    found: Counter[tuple[str, tuple[str, ...]]] = Counter()
    readers: dict[tuple[str, tuple[str, ...]], RowReader] = {}
    refused: ValueError | None = None
    columns = Counter(tuple(row.values) for row in rows if isinstance(row, Row))  # in the order of the rows
    for names, count in columns.items():
        try:
            reader = row_reader(names, config)
        except BadRow:
            raise
        except ValueError as error:
            refused = refused or error
        else:
            found[reader.format, reader.columns] += count
            readers.setdefault((reader.format, reader.columns), reader)
    if not found:
        return None, refused
    reader = readers[found.most_common(1)[0][0]]
    if config.on_too_long is OnTooLong.split and reader.format not in WITHOUT_TURNS:
        raise ValueError(
            f"data.on_too_long=split: only plain text can be split, these rows are {reader.format}; "
            "use truncate, skip or error"
        )
    return reader, refused


def _unread_message(unread: Counter[str], rows: int) -> str:
    counts = ", ".join(f"{name} ({count:,} rows)" for name, count in unread.most_common())
    found = (match[2] for name in unread if (match := _QUOTED.search(name)))
    names = ",".join(dict.fromkeys(name if _PLAIN.fullmatch(name) else repr(name) for name in found))
    return (
        f"nobody reads {counts} of {rows:,} rows: data.ignore_columns=[{names}] leaves them out, data.prompt_template "
        "writes columns into the prompt, and data.system_column, history_column, input_column, tools_column and "
        "reasoning_column rename what a row may hold beside its prompt and answer"
        + ("; objective=kto trains on answers with a label" if "column 'label'" in unread else "")
        + ("; objective=reward reads data.margin_column=margin" if "column 'margin'" in unread else "")
    )


def read_conversations(
    config: DataConfig, split: str, limit: int | None = None
) -> list[tuple[dict[str, Any], Conversation]]:
    """The first usable rows of a split, each with its messages; bad rows as `data.on_bad_row` says.

    Those of a mixture come from its sources in turn. Raises `BadRow`, ValueError for options that do not fit the rows.
    """
    turns = zip_longest(*(_conversations(source, split, limit) for source in sources_of(config)))
    return list(islice((found for turn in turns for found in turn if found is not None), limit))


def _conversations(source: MixedSource, split: str, limit: int | None) -> list[tuple[dict[str, Any], Conversation]]:
    config = source.config
    found: list[tuple[dict[str, Any], Conversation]] = []
    with naming(source.name):
        rows = iterate_rows(config, split)
        first = list(islice(rows, ROWS_AT_ONCE))
        reader, refused = _find_reader(first, config)
        for row in chain(first, rows):
            if limit is not None and len(found) >= limit:
                break
            try:
                if isinstance(row, BadRow):
                    raise row
                if reader is None:
                    raise BadRow.because(row.origin, str(refused))
                found.append((row.values, _read(reader, row)))
            except BadRow:
                if config.on_bad_row is OnBadRow.error:
                    raise
    return found


def _read(reader: RowReader, row: Row) -> Conversation:
    """The conversation of a row. Raises `BadRow` whatever is wrong with it, also in a format of one's own."""
    try:
        return reader(row)
    except BadRow:
        raise
    except Exception as error:
        raise BadRow.because(row.origin, f"cannot be read ({type(error).__name__}: {error})") from error


def _refuse(error: BadRow, config: DataConfig, audit: Audit) -> None:
    if config.on_bad_row is OnBadRow.error:
        raise error
    audit.count_bad_row(error)


@contextmanager
def _refusing(origin: str, config: DataConfig, audit: Audit) -> Iterator[None]:
    """Inside, a fault of the row is raised, or counted where bad rows are skipped."""
    try:
        yield
    except DuplicateBosError as error:
        if config.on_bad_row is OnBadRow.error:
            raise
        audit.count_bad_row(BadRow.because(origin, str(error).removeprefix(f"{origin}: ")))
    except BadRow as error:
        _refuse(error, config, audit)


def _encode(
    read: list[tuple[str, Conversation]],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    audit: Audit,
    before: Conversation | None,
) -> Iterator[Encoded]:
    if config.rows not in (None, RowKind.answers):
        yield from _encode_units(read, config, tokenizer, encoder, audit, before)
        return
    outcomes: Sequence[Outcome]
    if all(conversation.tokens is not None for _, conversation in read):
        ends = end_token_ids(tokenizer) if read else set()
        outcomes = [[sample_of(conversation.tokens, ends)] for _, conversation in read if conversation.tokens]
    else:
        outcomes = encoder.encode([conversation for _, conversation in read])
    taught: Sequence[Outcome | None] = [None] * len(read)
    if config.teacher_prompt is not None and read:
        taught = encoder.encode([conversation.taught or conversation for _, conversation in read])
    for (origin, conversation), outcome, twins in zip(read, outcomes, taught, strict=True):
        with _refusing(origin, config, audit):
            if isinstance(outcome, Exception):
                raise BadRow.because(origin, what_is_wrong(outcome)) from outcome
            if conversation.first_trained == len(conversation) and conversation.last_answer is not None:
                raise BadRow.because(origin, "expected an answer to train, got weight 0 for all of them")
            audit.own_turns += len(outcome) - 1
            if twins is not None:
                outcome = _with_twins(outcome, twins, origin)
            samples = list(chain.from_iterable(fit(encoded, origin, config, audit) for encoded in outcome))
            trained = [sample for sample in samples if any(kinds_of(sample))]
            for sample in trained or samples[-1:]:
                check_sample(sample, origin, tokenizer)
            audit.lost_turns += len(samples) - len(trained)
            for sample in trained:
                if sample.taught is not None:
                    twin = _cut_alike(sample.taught, sample)
                    sample = replace(sample, taught=twin)
                    audit.taught_tokens += len(twin.input_ids)
                audit.count_sample(sample, kinds_of(sample))
                yield sample


def _with_twins(samples: list[Encoded], twins: Outcome, origin: str) -> list[Encoded]:
    """Return the samples of a row, each with what a teacher reads in its place. Raises `BadRow`."""
    if isinstance(twins, Exception):
        raise BadRow.because(origin, f"behind data.teacher_prompt: {what_is_wrong(twins)}") from twins
    trained = [[[label for label in one.labels if label != IGNORED_LABEL] for one in some] for some in (samples, twins)]
    if trained[0] != trained[1]:
        raise BadRow.because(
            origin,
            "expected the same tokens to train behind data.teacher_prompt, the chat template writes others there; use "
            "data.train_on_last_turn=true, or a teacher_prompt that ends in white space",
        )
    return [replace(sample, taught=twin) for sample, twin in zip(samples, twins, strict=True)]


def _cut_alike(taught: Encoded, sample: Encoded) -> Encoded:
    """Return what a teacher reads up to the last token that is trained in the sample, which may have been cut."""
    count = len(sample.labels) - sample.labels.count(IGNORED_LABEL)
    places = [place for place, label in enumerate(taught.labels) if label != IGNORED_LABEL]
    return cut_to(taught, places[count - 1] + 1)


def _encode_units(
    read: list[tuple[str, Conversation]],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    audit: Audit,
    before: Conversation | None,
) -> Iterator[Encoded]:
    """Samples of preference rows, those that belong together one after the other; a row gives all of them or none."""
    units = [_unit(read, place, before) for place in range(len(read))]
    audit.without_others += len(read) == 1 and before is None and read[0][1].rejected is None
    outcomes = iter(encoder.encode([conversation for unit in units for conversation, _ in unit]) if read else [])
    for (origin, _), unit in zip(read, units, strict=True):
        encoded: list[Encoded] = []
        with _refusing(origin, config, audit):
            for (conversation, standing), outcome in zip(unit, [next(outcomes) for _ in unit], strict=True):
                if isinstance(outcome, Exception):
                    raise BadRow.because(origin, what_is_wrong(outcome)) from outcome
                if len(outcome) > 1:
                    raise BadRow.because(
                        origin,
                        "expected one answer behind the prompt, got several turns that the chat template rewrites as "
                        "the conversation goes on",
                    )
                margin = conversation.margin if standing is Standing.chosen else None
                sample = replace(outcome[0], standing=standing, weights=None, margin=margin)
                pieces = fit(sample, origin, config, audit)
                if not pieces:
                    break
                check_sample(pieces[0], origin, tokenizer)
                encoded += pieces
            else:
                audit.count_unit(encoded)
                for sample in encoded:
                    if sample.standing is not Standing.mismatched:
                        audit.count_sample(sample, kinds_of(sample))
                    yield sample


def _unit(
    read: list[tuple[str, Conversation]], place: int, before: Conversation | None
) -> list[tuple[Conversation, Standing]]:
    """Return what belongs together of a row: both answers, or the answer and that of the row before to its prompt.

    The row before the first of several is their last, and before one alone it is `before`, of those read earlier.
    """
    conversation = read[place][1]
    if conversation.rejected is not None:
        return [(conversation, Standing.chosen), (conversation.rejected, Standing.rejected)]
    other = before if len(read) == 1 and before is not None else read[place - 1][1]
    mismatched = Conversation(
        [*conversation[: conversation.first_trained], *other[other.first_trained :]], conversation.tools
    )
    standing = Standing.chosen if conversation.wanted else Standing.rejected
    return [(conversation, standing), (mismatched, Standing.mismatched)]


def what_is_wrong(error: Exception) -> str:
    """An error of a template or tokenizer as a sentence about the row."""
    if isinstance(error, UnicodeError) or "TextEncodeInput" in str(error) or "surrogates" in str(error):
        return "expected UTF-8 text, got half of a surrogate pair or bytes of another encoding"
    if isinstance(error, RecursionError):
        return "expected a conversation that the chat template can render, got one nested too deeply"
    return str(error).strip().split("\n")[0] or type(error).__name__
