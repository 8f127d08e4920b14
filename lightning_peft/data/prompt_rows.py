"""Rows that hold no answer yet: the conversation to go on with, and its tokens."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lightning_peft.data.chat import refusal
from lightning_peft.data.config import Format
from lightning_peft.data.conversation import BadRow, Conversation, Row
from lightning_peft.data.formats import FORMATS, RowReader
from lightning_peft.data.layout import PromptLayout
from lightning_peft.data.turns import WEIGHT_COLUMN

_COLUMNS = {"prompt": Format.prompt_completion, "messages": Format.messages}
"""Columns that ask, each with the format of training rows whose other columns may stand beside it."""
_OF_ANSWERS = frozenset(("reasoning", "prompt"))
"""The side columns that belong to an answer, or are the question itself."""


def read_prompt(row: Row, is_raw: bool = False) -> Conversation:
    """Return the conversation that a row asks to go on with, by what training reads of such rows.

    The conversation's `listed` and `unread` have the names of other columns. is_raw: prompts are texts that are
    continued, without turns. Raises `BadRow`, also for turns that end in an answer, for keys of turns that nobody
    reads, and for columns that can stand beside a prompt and not beside turns.
    """
    given = [column for column in _COLUMNS if row.values.get(column) not in (None, "", [])]
    if len(given) != 1:
        expected = "text under prompt, or turns under messages"
        raise BadRow(row.origin, f"{expected}, not both" if given else expected, row.values)
    (column,) = given
    sides = {format: FORMATS[format].side for format in _COLUMNS.values()}
    side = [name for name in sides[_COLUMNS[column]] if name not in _OF_ANSWERS]
    for name in sides[Format.prompt_completion]:
        if name not in (*side, *_OF_ANSWERS) and row.values.get(name) not in (None, "", []):
            raise BadRow(row.origin, f"no {name} beside the turns of {column}", row.values[name], name)
    reader = RowReader(
        columns=(column,),
        side={name: name for name in side},
        format=_COLUMNS[column],
        ignored=frozenset((WEIGHT_COLUMN,)),  # an answer to be generated has no loss to weigh
        is_raw=is_raw,
    )
    found = reader.asked(row)
    if keys := [name for name in found.unread if not name.startswith("column ")]:
        raise BadRow.because(row.origin, f"nobody reads {keys[0]}; leave it out")
    if found[-1].role == "assistant":
        last = "prompt ends" if column == "prompt" else f"{column} end"
        raise BadRow.because(row.origin, f"its {last} in an answer; leave that out to have one generated")
    if is_raw and (len(found) > 1 or found.tools or not isinstance(row.values.get("prompt"), str)):
        there = [name for name in side if name != "input" and row.values.get(name) not in (None, "", [])]
        has = ", ".join(there) or f"turns under {column}"
        raise BadRow.because(row.origin, f"has {has}, and the adapter was trained on text without turns")
    found.origin = row.origin
    return found


def prompts_of(
    conversations: Sequence[Conversation], layout: PromptLayout, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Return the tokens to generate the next turn of each conversation from. Raises `BadRow` that names its row."""
    return [_prompt_of(conversation, layout, tokenizer) for conversation in conversations]


def _prompt_of(conversation: Conversation, layout: PromptLayout, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    try:
        return layout.prompt(conversation, tokenizer)
    except ValueError as error:
        if not conversation.origin or isinstance(error, BadRow):
            raise
        raise refusal(error, conversation.origin) from error
