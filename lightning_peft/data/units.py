"""Samples of preference rows: those of a row belong together."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from lightning_peft.data.audit import Audit, DuplicateBosError, check_sample
from lightning_peft.data.chat import Encoded, EncodedOrError, Encoder, refusal
from lightning_peft.data.config import DataConfig
from lightning_peft.data.conversation import BadRow, Conversation
from lightning_peft.data.preferences import Standing
from lightning_peft.data.token_store import kinds_of
from lightning_peft.data.too_long import fits, shortened


def encode_units(
    read: list[tuple[str, Conversation]],
    before: Conversation | None,
    encoder: Encoder,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    audit: Audit,
    refuse: Callable[[BadRow | DuplicateBosError], None],
) -> Iterator[Encoded]:
    """Return samples of preference rows, those of a row one after the other; a row gives all of its own or none.

    before: the row that was read before these; refuse: takes the error of a row.
    """
    units = [_unit(read, place, before) for place in range(len(read))]
    audit.without_others += len(read) == 1 and before is None and read[0][1].rejected is None
    outcomes = iter(encoder.encode([conversation for unit in units for conversation, _ in unit]) if read else [])
    for (origin, _), unit in zip(read, units, strict=True):
        try:
            encoded = _trained_unit(unit, [next(outcomes) for _ in unit], origin, config, tokenizer, audit)
        except (BadRow, DuplicateBosError) as error:
            refuse(error)
            continue
        if not encoded:
            continue
        audit.count_unit(encoded)
        for sample in encoded:
            if sample.standing is not Standing.mismatched:
                audit.count_sample(sample, kinds_of(sample), origin)
            yield sample


def _trained_unit(
    unit: list[tuple[Conversation, Standing]],
    outcomes: Sequence[EncodedOrError],
    origin: str,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    audit: Audit,
) -> list[Encoded]:
    """Return the samples of a row that belong together; none where one is too long and left out.

    Raises `BadRow`, `DuplicateBosError`.
    """
    encoded: list[Encoded] = []
    for (conversation, standing), outcome in zip(unit, outcomes, strict=True):
        if isinstance(outcome, Exception):
            raise refusal(outcome, origin) from outcome
        if len(outcome) > 1:
            raise BadRow.because(
                origin,
                "expected one answer behind the prompt, got several turns that the chat template rewrites as the "
                "conversation goes on",
            )
        margin = conversation.margin if standing is Standing.chosen else None
        sample = replace(outcome[0], standing=standing, weights=None, margin=margin)
        pieces = [sample] if fits(sample, config) else shortened(sample, origin, config, audit)
        if not pieces:
            return []
        check_sample(pieces[0], origin, tokenizer)
        encoded += pieces
    return encoded


def _unit(
    read: list[tuple[str, Conversation]], place: int, before: Conversation | None
) -> list[tuple[Conversation, Standing]]:
    """Return what belongs together of a row: both answers, or the answer and that of the row before to its prompt.

    The row before the first of several is their last; before one alone it is `before`, a row read earlier.
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
