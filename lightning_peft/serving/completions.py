"""Answers in OpenAI's words."""

import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lightning_peft.inference.answer_text import UNFINISHED
from lightning_peft.serving.bodies import Sampling
from lightning_peft.serving.engine import Piece


def error_body(message: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}


@dataclass
class Answer:
    """A completion in OpenAI's words."""

    body: Sampling
    kind: str
    """chat or text."""
    logprobs: bool
    top_logprobs: int
    tokenizer: PreTrainedTokenizerBase
    offset: int = 0
    """Characters of the tokens that were written down."""
    said_role: bool = False
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def envelope(self, streamed: bool) -> dict[str, Any]:
        name = "text_completion" if self.kind == "text" else f"chat.completion{'.chunk' if streamed else ''}"
        return {"id": self.id, "object": name, "created": self.created, "model": self.body.model}

    def choice(self, text: str, pieces: list[Piece], reason: str | None, streamed: bool) -> dict[str, Any]:
        said = self._said(pieces) if self.logprobs else None
        common = {"index": 0, "finish_reason": reason, "logprobs": said}
        if self.kind == "text":
            return {"text": text, **common}
        if not streamed:
            return {"message": {"role": "assistant", "content": text}, **common}
        role = {} if self.said_role else {"role": "assistant"}  # clients add up the texts of deltas, the role's too
        self.said_role = True
        return {"delta": {**role, "content": text}, **common}

    def _said(self, pieces: list[Piece]) -> dict[str, Any]:
        found = [piece.choice for piece in pieces if piece.choice is not None]
        if self.kind == "text":
            texts = [token_text(self.tokenizer, choice.token) for choice in found]
            offsets: list[int] = []
            for text in texts:
                offsets.append(self.offset)
                self.offset += len(text)
            return {
                "tokens": texts,
                "token_logprobs": [c.logprob for c in found],
                "top_logprobs": [{token_text(self.tokenizer, t): p for t, p in c.top} for c in found],
                "text_offset": offsets,
            }
        return {
            "content": [
                {**self._entry(c.token, c.logprob), "top_logprobs": [self._entry(t, p) for t, p in c.top]}
                for c in found
            ],
            "refusal": None,
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text, content = str(self.tokenizer.decode([token])), token_bytes(self.tokenizer, token)
        return {"token": text, "logprob": logprob, "bytes": None if content is None else list(content)}


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes | None:
    """Return the bytes of a token, which may be a part of a character; None where its name does not tell them."""
    text = str(tokenizer.decode([token]))
    if UNFINISHED not in text:
        return text.encode()
    name = str(tokenizer.convert_ids_to_tokens(token))
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", name):
        return bytes.fromhex(byte[1])
    letters = {letter: number for number, letter in bytes_to_unicode().items()}
    return bytes(letters[letter] for letter in name) if letters.keys() >= set(name) else None


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return a token's text; where it is a part of a character its bytes, as OpenAI writes them: `bytes:\\xe2\\x82`."""
    text = str(tokenizer.decode([token]))
    if UNFINISHED not in text or (content := token_bytes(tokenizer, token)) is None:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
