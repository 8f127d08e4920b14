"""Rows that were tokenised before they came here."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_peft.data.batch import IGNORED_LABEL
from lightning_peft.data.chat import Encoded
from lightning_peft.data.conversation import BadRow, Row, Tokens, read_json
from lightning_peft.data.rendering import TokenKind
from lightning_peft.data.turns import HEAVIEST

COLUMNS = ("input_ids", "labels", "attention_mask", "position_ids", "weights")
"""Columns that such a row may hold; the first is needed."""
_HIGHEST = 2**31 - 1


def read_tokens(row: Row, weight: float) -> Tokens:
    """Return the tokens of a row; all are trained where it has no labels, and count `weight` each.

    Raises `BadRow` for lists of different lengths, for labels other than -100 and the token in their place, for an
    attention mask that hides a token, as padding is to be left out, and for positions of more than one sample.
    """
    input_ids = _list(row, "input_ids", int)
    if not input_ids:
        raise BadRow(row.origin, "at least one token", row.values.get("input_ids"), "input_ids")
    if not 0 <= min(input_ids) <= max(input_ids) <= _HIGHEST:
        wrong = next(token for token in input_ids if not 0 <= token <= _HIGHEST)
        raise BadRow(row.origin, "token ids from 0 on", wrong, "input_ids")
    labels = _list(row, "labels", int)
    mask = _list(row, "attention_mask", int)
    positions, weights = _list(row, "position_ids", int), _list(row, "weights", float)
    lists = {"labels": labels, "attention_mask": mask, "position_ids": positions, "weights": weights}
    for column, values in lists.items():
        if values is not None and len(values) != len(input_ids):
            raise BadRow(row.origin, f"as many as the {len(input_ids)} input_ids", f"{len(values)} of them", column)
    if mask is not None and any(value != 1 for value in mask):
        raise BadRow.because(
            row.origin, "column 'attention_mask': expected ones only (samples are packed here: leave padding out)"
        )
    if positions is not None and positions != list(range(len(input_ids))):
        raise BadRow(row.origin, "0, 1, 2 and so on, as of one sample", positions, "position_ids")
    if labels is None:
        labels = list(input_ids)
    for place, (token, label) in enumerate(zip(input_ids, labels, strict=True)):
        if label not in (IGNORED_LABEL, token):
            expected = f"-100 or the token itself, {token}, at place {place} (labels are not shifted)"
            raise BadRow(row.origin, expected, label, "labels")
    if weight != 1:
        weights = [weight * value for value in weights or [1.0] * len(input_ids)]
    if weights is not None and not all(0 <= value <= HEAVIEST for value in weights):
        raise BadRow(row.origin, f"numbers from 0 on, at most {HEAVIEST:.3g}", weights, "weights")
    return Tokens(input_ids, labels, weights)


def _list(row: Row, column: str, kind: type) -> list[Any] | None:
    value = row.values.get(column)
    if isinstance(value, str) and value.strip():
        try:
            value = read_json(value)
        except (ValueError, RecursionError) as error:
            raise BadRow(row.origin, f"a list of numbers ({error})", value, column) from error
    if value is None or value == "":
        if column == COLUMNS[0]:
            raise BadRow(row.origin, "a list of token ids", value, column)
        return None
    allowed = (int,) if kind is int else (int, float)
    if not isinstance(value, list) or any(type(number) not in allowed for number in value):
        raise BadRow(row.origin, f"a list of {'whole ' * (kind is int)}numbers", value, column)
    return value


def foreign_token(tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> ValueError | None:
    """Return what is wrong with a row one of whose ids is no token of the tokenizer; None where all are."""
    if max(tokens.input_ids) < (size := len(tokenizer)):
        return None
    beyond = sorted({token for token in tokens.input_ids if token >= size})
    foreign = next((token for token in beyond if tokenizer.convert_ids_to_tokens(token) is None), None)
    if foreign is None:
        return None
    return ValueError(f"column 'input_ids': a token has the id {foreign}, and the tokenizer has {size:,} tokens")


def sample_of(tokens: Tokens, ends: set[int]) -> Encoded:
    """Return the sample that the tokens are; `ends` are the tokens at which generation stops."""
    labels = [IGNORED_LABEL, *tokens.labels[1:]]
    weights = tokens.weights
    if weights is not None:  # a token of weight 0 is not trained
        labels = [label if factor else IGNORED_LABEL for label, factor in zip(labels, weights, strict=True)]
    kinds = bytes(
        TokenKind.none if label == IGNORED_LABEL else TokenKind.end if label in ends else TokenKind.answer
        for label in labels
    )
    trained = kinds.rstrip(b"\0")
    return Encoded(tokens.input_ids, labels, trained[-1:] == bytes((TokenKind.end,)), kinds=kinds, weights=weights)
