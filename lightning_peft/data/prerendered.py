"""Rows whose text already holds what the chat template would write."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lightning_peft.data.chat import special_tokens
from lightning_peft.data.conversation import BadRow, Message
from lightning_peft.data.template import ChatTemplate

_QUESTION = "\ue002"


class RenderedText:
    """Finds questions that a chat template has written already.

    A token of the template inside a text is left alone: data sets about templates, and attacks on them, have it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
        question = [{"role": "user", "content": _QUESTION}]
        text = template.render(question, None, True)
        before, after = text.split(_QUESTION)[0], text.split(_QUESTION)[-1]
        special = special_tokens(tokenizer)
        self._beginnings = tuple(token for token in {*special, tokenizer.bos_token} if token and token in before)
        marked = template.marked(question, None, True)
        header = (text[marked.end :] if marked is not None else after).strip()
        self._ending = header if any(token in header for token in special) else ""

    def refuse(self, messages: Sequence[Message], origin: str) -> None:
        """Raises `BadRow` for a question that begins with a turn's first token, or ends with a generation prompt."""
        for message in messages:
            if message.role != "user":
                continue
            text = message.content.strip()
            if text.startswith(self._beginnings) or (self._ending and text.endswith(self._ending)):
                raise BadRow(
                    origin,
                    "text without the chat template's own tokens (data.layout=raw trains rows that hold them)",
                    message.content,
                )
