"""The text of an answer while its tokens come."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""Character that bytes decode to while they are no whole one yet."""
MOST_TOKENS, KEPT_TOKENS = 64, 8
"""Tokens that are decoded at once, and those of them that the next ones are decoded behind: some tokenizers take a
blank away where a text begins."""
MOST_KEPT = KEPT_TOKENS + 3
"""Tokens that are kept at most: the first is no byte within a character, of which there are up to four."""


class AnswerText:
    """The text of tokens that come one by one behind those `before`, special ones left out.

    Only the last tokens are decoded anew for each that comes: of all of them a long answer would cost the square.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.whole = ""
        self._settled = ""
        """Text before that of the last tokens."""
        self._last = self._kept(list(before)) or list(before[-KEPT_TOKENS:])
        self._known = len(self._decoded()) if before else 0
        """Characters of the last tokens that are settled."""

    def add(self, token: int) -> None:
        """Take the next token."""
        self._last.append(token)
        self.whole = self._settled + self._decoded()[self._known :]
        if len(self._last) >= MOST_TOKENS and self.is_ready and (kept := self._kept(self._last)) is not None:
            self._settled, self._last = self.whole, kept
            self._known = len(self._decoded())

    @property
    def is_ready(self) -> bool:
        """Return whether the text ends in a whole character."""
        return not self.whole.endswith(UNFINISHED)

    def _kept(self, tokens: list[int]) -> list[int] | None:
        """Return the last tokens, from one on that begins a character; None where none is known to.

        A tokenizer with a fallback to bytes gives no text for neighbouring bytes of which the first are within one.
        """
        for count in range(KEPT_TOKENS, MOST_KEPT + 1):
            text = self._text(kept := tokens[-count:])
            if not text.startswith(UNFINISHED) or self.whole.endswith(text):
                return kept
        return None

    def _decoded(self) -> str:
        return self._text(self._last)

    def _text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))
