"""Make tokenised samples of rows, under the options for bad and too long rows."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice, zip_longest
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_peft.data.audit import Audit, DuplicateBosError, check_sample
from lightning_peft.data.chat import Encoded, EncodedOrError, Encoder, encoder_of, end_token_ids, refusal
from lightning_peft.data.config import DataConfig, Layout, OnBadRow, OnTooLong, RowKind
from lightning_peft.data.conversation import BadRow, Conversation, Row
from lightning_peft.data.formats import WITHOUT_TURNS, RowReader
from lightning_peft.data.mixture import MixedSource, naming, sources_of
from lightning_peft.data.prerendered import RenderedText
from lightning_peft.data.row_reader import row_reader
from lightning_peft.data.sources import file_count, iterate_rows
from lightning_peft.data.taught import with_twin_cut, with_twins
from lightning_peft.data.template import ChatTemplate
from lightning_peft.data.token_rows import foreign_token, sample_of
from lightning_peft.data.token_store import Samples, kinds_of
from lightning_peft.data.too_long import fits, shortened
from lightning_peft.data.units import encode_units
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
    """Return the tokenised rows of a split, of the first window of the training rows when streaming, and their counts.

    The first window is the first that has a sample, and those before it. Raises `BadRow`, `UnreadError`, ValueError
    for options that do not fit the rows, `ChatTemplateError`, `DuplicateBosError`.
    """
    rows = iterate_rows(config, split)
    audit = Audit(files=file_count(config, split))
    group = (config.rows or RowKind.answers).samples
    with Part(f"tokenising the {split} rows") as part:
        if not config.streaming or split != "train":
            return Samples.of(encode_rows(rows, config, tokenizer, audit, part), group), audit
        reader = reader_of(config, split)
        while True:
            window = list(islice(rows, config.shuffle_window))
            samples = Samples.of(encode_rows(window, config, tokenizer, audit, part, reader), group)
            if len(samples) or not window:
                return samples, audit


def encode_rows(
    rows: Iterable[Row | BadRow],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    audit: Audit,
    part: Part | None = None,
    reader: RowReader | None = None,
) -> Iterator[Encoded]:
    """Return the samples of the rows in their order, counted in `audit`; `part` advances with the rows.

    reader: of all rows of which these are a window; None takes what fits most of the first of these. Raises `BadRow`,
    `UnreadError`, ValueError for options that do not fit the rows, `ChatTemplateError`, `DuplicateBosError`.
    """
    encoder = encoder_of(config, tokenizer)
    reading = _Reading(config, tokenizer, encoder, audit, reader)
    rows = iter(rows)
    while several := list(islice(rows, ROWS_AT_ONCE)):
        before = reading.last
        read = reading.conversations(several)
        if part is not None:
            part.advance(len(several))
        if reading.unread:  # the other names are only counted
            continue
        if config.rows not in (None, RowKind.answers):
            refuse = partial(_refuse, config=config, audit=audit)
            yield from encode_units(read, before, encoder, config, tokenizer, audit, refuse)
            continue
        for (origin, conversation), outcome, twins in zip(
            read, *_outcomes(read, config, tokenizer, encoder), strict=True
        ):
            try:
                samples = _trained(conversation, outcome, twins, origin, config, tokenizer, audit)
            except (BadRow, DuplicateBosError) as error:
                _refuse(error, config, audit)
                continue
            for sample in samples:
                audit.count_sample(sample, kinds_of(sample), origin)
                yield sample
    reading.finish()


class _Reading:
    """Rows read as conversations, block after block, and the names in them that nobody reads."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        encoder: Encoder,
        audit: Audit,
        reader: RowReader | None,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._audit = audit
        self._reader = reader
        self._refused: ValueError | None = None
        self._template: ChatTemplate | None = None
        self._rendered: RenderedText | None = None
        self.unread: Counter[str] = Counter()
        """Rows that have a column, or a key of a turn, which nobody reads and which may be part of a conversation."""
        self.last: Conversation | None = None
        """The last conversation that was read."""

    def conversations(self, rows: Sequence[Row | BadRow]) -> list[tuple[str, Conversation]]:
        """Return the conversation of each row with the row's place; bad rows as `data.on_bad_row` says."""
        if self._reader is None:
            self._reader, self._refused = _find_reader(rows, self._config)
        if self._reader is not None:
            self._audit.format = self._reader.format
        found: list[tuple[str, Conversation]] = []
        for row in rows:
            self._audit.rows += 1
            try:
                if isinstance(row, BadRow):
                    raise row
                conversation = _read(self._reader, self._refused, row)
                self._check(conversation, row)
                found.append((row.origin, conversation))
            except BadRow as error:
                _refuse(error, self._config, self._audit)
        self.last = found[-1][1] if found else self.last
        return found

    def _check(self, conversation: Conversation, row: Row) -> None:
        """Count what is not read of a row. Raises `BadRow` for text with the chat template's own tokens around it."""
        reader, audit = self._reader, self._audit
        assert reader is not None
        if reader.ignored:
            audit.count_ignored(reader.ignores(row))
        if self._config.layout is Layout.chat and reader.format not in WITHOUT_TURNS:
            if self._template is None or self._rendered is None:  # found once, not by row
                self._template = self._encoder.template
                self._rendered = RenderedText(self._tokenizer, self._template, self._encoder.end_token_ids())
            self._rendered.refuse(conversation, row.origin)
            if conversation.rejected is not None:
                self._rendered.refuse(conversation.rejected, row.origin)
            if not_written := unwritten(conversation, self._template):
                self.unread.update(name for name, is_id in not_written if not is_id)
                audit.count_listed(name for name, is_id in not_written if is_id)
        if conversation.unread:
            self.unread.update(conversation.unread)
        audit.count_listed(conversation.listed)
        if conversation.trailing:
            audit.count_listed(["turns after the last answer"])
        audit.count_tools(conversation.tools)
        audit.count_system(conversation)

    def finish(self) -> None:
        """Raise `UnreadError` for what nobody reads, and the error of the first row where none could be read."""
        if self.unread:
            raise UnreadError(_unread_message(self.unread, self._audit.rows))
        if self._refused is not None and self._reader is None and self._audit.rows == self._audit.bad_rows:
            raise ValueError(self._audit.bad_row_messages[0]) from self._refused


def _read(reader: RowReader | None, refused: ValueError | None, row: Row) -> Conversation:
    """Return the conversation of a row. Raises `BadRow` for any error of the row, also in a format of one's own.

    refused: the error that says why there is no reader.
    """
    if reader is None:
        raise BadRow.because(row.origin, str(refused))
    try:
        return reader(row)
    except BadRow:
        raise
    except Exception as error:
        raise BadRow.because(row.origin, f"cannot be read ({type(error).__name__}: {error})") from error


def unwritten(conversation: Conversation, template: ChatTemplate) -> list[tuple[str, bool]]:
    """Name the keys of turns that the chat template does not write, and whether they only identify a call."""
    found: dict[str, bool] = {}
    for message in chain(conversation, conversation.rejected or ()):
        for key, value in (("name", message.name), ("tool_call_id", message.tool_call_id)):
            if value is not None and not template.writes(message.role, key):
                found[f"key {key!r} of a turn of the {message.role}"] = message.role == "tool"
    return list(found.items())


def reader_of(config: DataConfig, split: str) -> RowReader | None:
    """Return the reader of the rows of a split, whichever window of them is read; None where no row can be read.

    The first rows in the order of the source decide, so that ranks, epochs and later starts read alike.
    """
    rows = iterate_rows(config, split)
    while several := list(islice(rows, ROWS_AT_ONCE)):
        reader, _ = _find_reader(several, config)
        if reader is not None:
            return reader
    return None


def _find_reader(rows: Iterable[Row | BadRow], config: DataConfig) -> tuple[RowReader | None, ValueError | None]:
    """Return the reader that fits most of the rows; the error of the first row where none fits any.

    With `data.on_bad_row=error` the first row that was read decides.
    """
    found: Counter[tuple[str, tuple[str, ...]]] = Counter()
    readers: dict[tuple[str, tuple[str, ...]], RowReader] = {}
    refused: ValueError | None = None
    columns = Counter(tuple(row.values) for row in rows if isinstance(row, Row))  # counted in the order of the rows
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
    config: DataConfig,
    split: str,
    limit: int | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    audit: Audit | None = None,
) -> list[tuple[dict[str, Any], Conversation]]:
    """Return the first usable rows of a split, each with its messages; bad rows as `data.on_bad_row` says.

    tokenizer: as in training, a row that it or its chat template refuses is a bad one; None looks at the rows alone.
    audit: counts the rows, for a caller whose rows nobody else counts. The rows of a mixture come from its sources in
    turn. Raises `BadRow`, ValueError for options that do not fit the rows.
    """
    turns = zip_longest(
        *(_conversations(source, split, limit, tokenizer, audit or Audit()) for source in sources_of(config))
    )
    return list(islice((found for turn in turns for found in turn if found is not None), limit))


def first_samples(config: DataConfig, split: str, tokenizer: PreTrainedTokenizerBase, limit: int) -> list[Encoded]:
    """Return the first samples of a split, as training makes them; those of a mixture come from its sources in turn.

    Raises as `encode_rows` does, of the rows that it reads.
    """
    turns = zip_longest(*(_samples(source, split, tokenizer) for source in sources_of(config)))
    return list(islice((found for turn in turns for found in turn if found is not None), limit))


def _samples(source: MixedSource, split: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[Encoded]:
    with naming(source.name):
        yield from encode_rows(iterate_rows(source.config, split), source.config, tokenizer, Audit())


def _conversations(
    source: MixedSource, split: str, limit: int | None, tokenizer: PreTrainedTokenizerBase | None, audit: Audit
) -> list[tuple[dict[str, Any], Conversation]]:
    config = source.config
    encoder = None if tokenizer is None else encoder_of(config, tokenizer)
    found: list[tuple[dict[str, Any], Conversation]] = []
    with naming(source.name):
        rows = iterate_rows(config, split)
        first = list(islice(rows, ROWS_AT_ONCE))
        reader, refused = _find_reader(first, config)
        rows = chain(first, rows)
        while several := list(islice(rows, ROWS_AT_ONCE if limit is None else min(ROWS_AT_ONCE, limit - len(found)))):
            found += _usable(several, reader, refused, encoder, config, audit)
    for _, conversation in found:
        conversation.source = source.name
    return found


def _usable(
    rows: Sequence[Row | BadRow],
    reader: RowReader | None,
    refused: ValueError | None,
    encoder: Encoder | None,
    config: DataConfig,
    audit: Audit,
) -> list[tuple[dict[str, Any], Conversation]]:
    """Return the rows that can be read and, where there is an encoder, laid out."""
    read: list[tuple[Row, Conversation]] = []
    for row in rows:
        audit.rows += 1
        try:
            if isinstance(row, BadRow):
                raise row
            read.append((row, _read(reader, refused, row)))
        except BadRow as error:
            _refuse(error, config, audit)
    parts = [part for _, conversation in read for part in (conversation, conversation.rejected) if part]
    outcomes = {} if encoder is None or not parts else dict(zip(map(id, parts), encoder.encode(parts), strict=True))
    found = []
    for row, conversation in read:
        laid_out = [outcomes.get(id(part)) for part in (conversation, conversation.rejected)]
        if wrong := next((outcome for outcome in laid_out if isinstance(outcome, Exception)), None):
            _refuse(refusal(wrong, row.origin), config, audit)
            continue
        conversation.origin = row.origin
        found.append((row.values, conversation))
    return found


def _refuse(error: BadRow | DuplicateBosError, config: DataConfig, audit: Audit) -> None:
    """Raise what is wrong with a row, or count it where bad rows are skipped."""
    if config.on_bad_row is OnBadRow.error:
        raise error
    audit.count_bad_row(error)


def _outcomes(
    read: list[tuple[str, Conversation]], config: DataConfig, tokenizer: PreTrainedTokenizerBase, encoder: Encoder
) -> tuple[Sequence[EncodedOrError], Sequence[EncodedOrError | None]]:
    """Return the samples of each row, and those that a teacher reads in their place, None where it reads the same."""
    outcomes: Sequence[EncodedOrError]
    if all(conversation.tokens is not None for _, conversation in read):
        ends = end_token_ids(tokenizer) if read else set()
        tokens = [conversation.tokens for _, conversation in read if conversation.tokens is not None]
        return [foreign_token(each, tokenizer) or [sample_of(each, ends)] for each in tokens], [None] * len(read)
    outcomes = encoder.encode([conversation for _, conversation in read])
    if config.teacher_prompt is None:
        return outcomes, [None] * len(read)
    return outcomes, encoder.encode([conversation.taught or conversation for _, conversation in read])


def _trained(
    conversation: Conversation,
    outcome: EncodedOrError,
    twins: EncodedOrError | None,
    origin: str,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    audit: Audit,
) -> list[Encoded]:
    """Return a row's samples with something to train, cut as the options say. Raises BadRow, DuplicateBosError."""
    if isinstance(outcome, Exception):
        raise refusal(outcome, origin) from outcome
    if conversation.first_trained == len(conversation) and conversation.last_answer is not None:
        raise BadRow.because(origin, "expected an answer to train, got weight 0 for all of them")
    audit.own_turns += len(outcome) - 1
    samples: list[Encoded] = []
    for sample in outcome if twins is None else with_twins(outcome, twins, origin):
        samples += [sample] if fits(sample, config) else shortened(sample, origin, config, audit)
    trained = [sample for sample in samples if any(kinds_of(sample))]
    for sample in trained or samples[-1:]:
        check_sample(sample, origin, tokenizer)
    audit.lost_turns += len(samples) - len(trained)
    return trained if twins is None else [with_twin_cut(sample, audit) for sample in trained]
