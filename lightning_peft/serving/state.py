"""The state that the endpoints share: names of models, how their prompts are written, what was answered."""

import threading
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from lightning_peft.data.conversation import Conversation, Message
from lightning_peft.data.layout import PromptLayout
from lightning_peft.data.template import ChatTemplateError
from lightning_peft.serving.adapter_checks import FolderVersion, folder_version, is_there, listed
from lightning_peft.serving.bodies import Turn
from lightning_peft.serving.engine import Engine
from lightning_peft.serving.prompt import most_bytes_a_token
from lightning_peft.serving.server_config import ServerConfig
from lightning_peft.serving.tiers import AdapterTiers, UnknownModelError


class ApiError(Exception):
    """An answer with a status and one line."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class Serving:
    """The state that the endpoints share."""

    engine: Engine
    tiers: AdapterTiers | None
    tokenizer: PreTrainedTokenizerFast
    base_name: str
    base_layout: PromptLayout
    context: int | None
    """Longest prompt and answer in tokens."""
    config: ServerConfig
    base_is_served: bool = True
    """True where the model answers under its own name; false where an adapter was merged into it."""
    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    """(model, status) -> requests."""
    layouts: dict[Path, tuple[FolderVersion | None, PromptLayout]] = field(default_factory=dict)
    """Adapter folder -> its prompts, and the files that it had when they were read."""
    versions: dict[Path, FolderVersion] = field(default_factory=dict)
    """Adapter folder -> its files when it was last asked for."""
    prompting: threading.Lock = field(default_factory=threading.Lock)
    """The tokenizer takes one chat template at a time."""

    def names(self) -> list[str]:
        return list(dict.fromkeys([self.base_name, *(self.tiers.names() if self.tiers is not None else [])]))

    def folder(self, model: str) -> Path | None:
        """Return the adapter's folder of a model name, None for the base. Raises ApiError."""
        if model == self.base_name:
            return None
        try:
            if self.tiers is not None:
                return self.as_it_is_now(self.tiers.folder(model))
        except UnknownModelError:
            pass
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        raise ApiError(404, f"model={model}: not here; there are {listed(self.names())}", "model_not_found")

    def as_it_is_now(self, folder: Path) -> Path:
        """Return an adapter's folder, which is read anew where its files are others than when it was last asked for.

        One that is gone or not whole leaves what is in memory as it is.
        """
        version = folder_version(folder)
        if is_there(version) and self.versions.setdefault(folder, version) != version:
            self.versions[folder] = version
            self.engine.forget(folder)
        return folder

    def layout(self, folder: Path | None) -> PromptLayout:
        """Return how prompts of an adapter are written: as `generate` writes them. Raises ApiError."""
        if folder is None:
            return self.base_layout
        version, held = self.versions.get(folder), self.layouts.get(folder)  # before the file is read in this thread
        if held is None or held[0] != version:
            try:
                saved = PromptLayout.load(folder)
            except ValueError as error:
                raise ApiError(400, str(error)) from error
            held = version, saved if saved is not None else replace(self.base_layout, system_prompt=None)
            self.layouts[folder] = held
        return held[1]

    def chat_prompt(self, folder: Path | None, turns: list[Turn], tools: list[dict[str, Any]]) -> list[int]:
        """Return the tokens of a chat as it was trained; `tools` in place of those of the training, where there are."""
        layout = self.layout(folder)
        messages = [
            Message(t.role, t.content, tool_calls=t.tool_calls, name=t.name, tool_call_id=t.tool_call_id) for t in turns
        ]
        if layout.kind != "chat":
            if len(messages) != 1 or messages[0].role != "user":
                raise ApiError(400, "messages: this adapter was trained on text without turns; give one user message")
            if tools:
                raise ApiError(400, "tools: this adapter was trained on text without turns, with no place for them")
            return self.laid_out(layout, layout.conversation(messages[0].content))
        return self.laid_out(layout, layout.going_on(messages, tools or None))

    def check_size(self, text: str) -> None:
        """Raise ApiError for a text that is too long whatever its tokens, before they are counted."""
        if self.context is None or self.most_bytes_a_token is None:
            return
        if (size := len(text.encode())) > (most := self.context * self.most_bytes_a_token):
            raise ApiError(
                400, f"the prompt's {size} bytes do not fit the model's {self.context} tokens, {most} bytes at most",
                "context_length_exceeded",
            )  # fmt: skip

    @cached_property
    def most_bytes_a_token(self) -> int | None:
        return most_bytes_a_token(self.tokenizer)

    def laid_out(self, layout: PromptLayout, messages: Conversation) -> list[int]:
        with self.prompting:
            before = self.tokenizer.chat_template
            try:
                return layout.prompt(messages, self.tokenizer, self.check_size)
            except (ChatTemplateError, ValueError) as error:
                said = str(error).partition("; data.")[0]  # options of training are no remedy of a client's
                raise ApiError(400, f"messages: {said}") from error
            finally:
                self.tokenizer.chat_template = before
