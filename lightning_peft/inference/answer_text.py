"""The text of an answer while its tokens come."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""Character that bytes decode to while they are no whole one yet."""
MOST_TOKENS, KEPT_TOKENS = 64, 8
"""Tokens that are decoded at once, and those of them that the next ones are decoded behind: some tokenizers take a
blank away where a text begins."""


class AnswerText:
    """The text of tokens that come one by one behind those `before`, special ones left out.

    Only the last tokens are decoded anew for each that comes: of all of them a long answer would cost the square.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.whole = ""
        self._settled = ""
        """Text before that of the last tokens."""
        self._last = list(before[-KEPT_TOKENS:])
        self._known = len(self._decoded()) if before else 0
        """Characters of the last tokens that are settled."""

    def add(self, token: int) -> None:
        """Take the next token."""
        self._last.append(token)
        self.whole = self._settled + self._decoded()[self._known :]
        if len(self._last) >= MOST_TOKENS and self.is_ready:
            self._settled, self._last = self.whole, self._last[-KEPT_TOKENS:]
            self._known = len(self._decoded())

    @property
    def is_ready(self) -> bool:
        """Return whether the text ends in a whole character."""
        return not self.whole.endswith(UNFINISHED)

    def _decoded(self) -> str:
        return str(self.tokenizer.decode(self._last, skip_special_tokens=True))
