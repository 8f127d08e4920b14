"""The way prompts are written: one object for training, scoring, chat and serving, saved with the adapter."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_peft.data.chat import Encoder
from lightning_peft.data.config import DataConfig, Format, Layout
from lightning_peft.data.conversation import TEXT_ROLE, Conversation, Message
from lightning_peft.data.template import ChatTemplateError

log = logging.getLogger(__name__)

FILE_NAME = "prompt_layout.json"


@dataclass(frozen=True)
class PromptLayout:
    """The text around a question, and the tokens at which its answer ends."""

    kind: str = "chat"
    """`chat`: by the chat template; `raw`: the prompt as it is; `text`: text that is continued."""
    system_prompt: str | None = None
    """System message of a conversation that has none: `data.system_prompt`, or that of all training rows."""
    template: str | None = None
    """The chat template; None takes the tokenizer's."""
    template_options: dict[str, Any] = field(default_factory=dict)
    """Variables of the template."""
    tools: list[dict[str, Any]] | None = None
    """Tools of a conversation that names none: those that all training rows share."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Tokens at which an answer ends, the model's own among them."""

    @classmethod
    def of(
        cls,
        config: DataConfig,
        format: str | None,
        tokenizer: PreTrainedTokenizerBase,
        tools: list[dict[str, Any]] | None = None,
    ) -> "PromptLayout":
        """Return the layout that rows of a format (of `Format`; None where no row was read) are trained in."""
        kind = "text" if format == Format.text else config.layout.value
        template = None
        stops = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
        if kind == "chat":
            encoder = Encoder(tokenizer, template_options=config.template_options)
            try:
                template, stops = encoder.template.source, encoder.end_token_ids()
            except ChatTemplateError:  # no row was laid out by it, or this would have been said there
                log.info("the chat template cannot be used, so it is not saved with the adapter")
        return cls(kind, config.system_prompt, template, dict(config.template_options), tools, sorted(stops))

    def save(self, folder: Path) -> None:
        (folder / FILE_NAME).write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "PromptLayout | None":
        """Return the layout saved with an adapter, None without one. Raises ValueError for a file that is no layout."""
        path = folder / FILE_NAME
        if not path.is_file():
            return None
        try:
            layout = cls(**json.loads(path.read_text(encoding="utf-8")))
            layout.check_types()
            return layout
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: not a prompt layout ({error})") from error

    def check_types(self) -> None:
        """Raise TypeError for a value from a file that is of another type than its field."""
        kinds: dict[str, type | tuple[type, ...]] = {
            "kind": str, "system_prompt": (str, type(None)), "template": (str, type(None)), "template_options": dict,
            "tools": (list, type(None)), "stop_token_ids": list,
        }  # fmt: skip
        for name, kind in kinds.items():
            if not isinstance(value := getattr(self, name), kind):
                raise TypeError(f"{name}={value!r} is of another type")
        if not all(type(number) is int for number in self.stop_token_ids):
            raise TypeError(f"stop_token_ids={self.stop_token_ids}: must be numbers")

    def changed_from(self, before: "PromptLayout") -> str | None:
        """Return the difference of prompts from those of an earlier layout, in words; None where there is none.

        System prompt and tools are left out: rows may say them.
        """
        if self.kind != before.kind:
            return f"laid out as {self.kind}, and were as {before.kind}"
        if self.template_options != before.template_options:
            return f"data.template_options={self.template_options}, and were {before.template_options}"
        if None not in (self.template, before.template) and self.template != before.template:
            return "written by another chat template"
        return None

    def with_stops(self, ids: Sequence[int] | int | None) -> "PromptLayout":
        """Return the layout whose answers end at these tokens as well: a model's `generation_config.eos_token_id`."""
        more = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
        return replace(self, stop_token_ids=sorted({*self.stop_token_ids, *more}))

    def conversation(self, question: str) -> Conversation:
        """Return a question as the beginning of a conversation."""
        if self.kind != "chat":
            return Conversation([Message(TEXT_ROLE, question)])
        return self.going_on([Message("user", question)])

    def going_on(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> Conversation:
        """Return a conversation to go on with: behind the system prompt, and with the tools, where it names none."""
        if self.system_prompt is not None and messages[0].role != "system":
            messages = [Message("system", self.system_prompt), *messages]
        return Conversation(messages, self.tools if tools is None else tools)

    def prompt(
        self,
        messages: Sequence[Message],
        tokenizer: PreTrainedTokenizerBase,
        check: Callable[[str], None] | None = None,
    ) -> list[int]:
        """Return the tokens to generate the next turn from: exactly those that stand before that turn in training.

        check: is given the text before its tokens are counted, and may raise.
        """
        layout = Layout.raw if self.kind == "raw" else Layout.chat
        if self.template is not None and self.kind == "chat":
            tokenizer.chat_template = self.template
        return Encoder(tokenizer, layout=layout, template_options=self.template_options).prompt(messages, check)
