"""Rows whose text already holds what the chat template would write."""

from collections.abc import Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from lightning_peft.data.chat import special_tokens
from lightning_peft.data.conversation import TEXT_ROLE, BadRow, Message
from lightning_peft.data.template import ChatTemplate


def refuse_rendered(
    messages: Sequence[Message], origin: str, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> None:
    """Raises `BadRow` for a question that begins with a turn's first token, or ends with a generation prompt.

    A token of the template inside a text is left alone: data sets about templates, and attacks on them, have it.
    """
    if messages[0].role == TEXT_ROLE:
        return
    beginnings, ending = _layout_of(template, tuple(special_tokens(tokenizer)), tokenizer.bos_token)
    for message in messages:
        if message.role != "user":
            continue
        text = message.content.strip()
        if text.startswith(beginnings) or (ending and text.endswith(ending)):
            raise BadRow(
                origin,
                "text without the chat template's own tokens (data.layout=raw trains rows that hold them as they are)",
                message.content,
            )


@lru_cache(maxsize=8)
def _layout_of(template: ChatTemplate, special: tuple[str, ...], bos: str | None) -> tuple[tuple[str, ...], str]:
    """What rendered text begins with, and the generation prompt where it holds a special token."""
    question = [{"role": "user", "content": "\ue002"}]
    text = template.render(question, None, True)
    before, after = text.split("\ue002")[0], text.split("\ue002")[-1]
    beginnings = {token for token in special if token in before}
    if bos:
        beginnings.add(bos)
    marked = template.marked(question, None, True)
    header = (marked.text[marked.end :] if marked is not None else after).strip()
    return tuple(sorted(beginnings)), header if any(token in header for token in special) else ""
