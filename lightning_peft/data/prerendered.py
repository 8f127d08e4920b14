"""Rows whose text already holds what the chat template would write."""

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from lightning_peft.data.chat import special_tokens
from lightning_peft.data.conversation import BadRow, Message
from lightning_peft.data.template import ChatTemplate

_QUESTION = "\ue002"


class RenderedText:
    """Finds turns that a chat template has written already.

    A token of the template inside a text is left alone: data sets about templates, and attacks on them, have it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, ends: Iterable[int]) -> None:
        """Find the tokens of the template around its turns; `ends` are the tokens at which an answer ends."""
        question = [{"role": "user", "content": _QUESTION}]
        text = template.render(question, None, True)
        before, after = text.split(_QUESTION)[0], text.split(_QUESTION)[-1]
        special = special_tokens(tokenizer)
        self._beginnings = tuple(token for token in {*special, tokenizer.bos_token} if token and token in before)
        marked = template.marked(question, None, True)
        header = (text[marked.end :] if marked is not None else after).strip()
        self._ending = header if any(token in header for token in special) else ""
        opening = next((token for token in special if header.startswith(token)), None)
        self._answer_beginnings = self._beginnings + (() if opening is None else (opening,))
        self._ends = tuple(str(tokenizer.convert_ids_to_tokens(token)) for token in ends)

    def refuse(self, messages: Sequence[Message], origin: str) -> None:
        """Raise `BadRow` for a message with tokens of the template around it.

        Such a message begins with a turn's first token, or is a question that ends with a generation prompt, or an
        answer that ends with an end token, which the template would write a second time.
        """
        for message in messages:
            text = message.content.strip()
            if message.role == "tool":
                continue
            if message.role == "assistant":
                found = text.startswith(self._answer_beginnings) or text.endswith(self._ends)
            else:
                found = text.startswith(self._beginnings) or bool(self._ending and text.endswith(self._ending))
            if found:
                shown = text if len(text) <= 60 else f"{text[:28]} ... {text[-28:]}"
                raise BadRow(
                    origin,
                    "text without the chat template's own tokens (data.layout=raw trains rows that hold them) from the "
                    f"{message.role}",
                    shown,
                )
