"""Ollama's Modelfile: base, adapter, and the prompt they were trained with in Ollama's own template language."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lightning_peft.data.layout import PromptLayout
from lightning_peft.serving.prompt import adds_bos, stop_texts

FILE_NAME = "Modelfile"
PROBES = (
    ["user"],
    ["system", "user"],
    ["user", "assistant", "user"],
    ["system", "user", "assistant", "user", "assistant", "user"],
)
"""Conversations, by their roles, that a template must lay out as its turns alone do."""


@dataclass(frozen=True)
class Turns:
    """A chat template that writes turn after turn: the text around each role's content."""

    opening: str
    """Text before every conversation: a token that the engine adds by itself is left out."""
    default_system: str
    """Text in place of a system turn where there is none."""
    around: dict[str, tuple[str, str]]
    """Role -> text before and after what it says."""
    answer: str
    """Text before the answer."""

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        has_system = any(message["role"] == "system" for message in messages)
        turns = (self.around[m["role"]][0] + m["content"] + self.around[m["role"]][1] for m in messages)
        return self.opening + ("" if has_system else self.default_system) + "".join(turns) + self.answer

    def go_template(self) -> str:
        """Return the turns in Ollama's language, Go's templates; Ollama adds `opening` by itself."""
        roles = "".join(
            f'{{{{ {"if" if number == 0 else "else if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for number, (role, (before, after)) in enumerate(self.around.items())
        )
        default = f"{{{{ if not .System }}}}{self.default_system}{{{{ end }}}}" if self.default_system else ""
        return f"{default}{{{{ range .Messages }}}}{roles}{{{{ end }}}}{{{{ end }}}}{self.answer}"


def turns_of(layout: PromptLayout, tokenizer: PreTrainedTokenizerBase, instead: str = "gguf") -> Turns:
    """Read the turns off a chat template. Raises ValueError for one that is more than its turns one after another."""
    template = layout.template or tokenizer.chat_template
    options = {"chat_template": template, "tokenize": False, "tools": layout.tools, **layout.template_options}

    def said(roles: Sequence[str]) -> list[dict[str, str]]:
        return [{"role": role, "content": f"<{number}{role}>"} for number, role in enumerate(roles)]

    def render(roles: Sequence[str], answer: bool = True) -> str:
        return str(tokenizer.apply_chat_template(said(roles), add_generation_prompt=answer, **options))

    try:
        between = re.split("<0system>|<1user>|<2assistant>|<3user>", render(["system", "user", "assistant", "user"]))
        start, after_system, after_user, after_answer, end = between
        user_after = render(["system", "user", "assistant", "user"], answer=False).rpartition("<3user>")[2]
        alone = render(["user"]).partition("<0user>")[0]
        # This text precedes every question, whatever stood before it.
        user_before = commonprefix([text[::-1] for text in (after_system, after_answer, alone)])[::-1]
        bos = str(tokenizer.bos_token) if adds_bos(tokenizer) else ""
        opening = bos if start.startswith(bos) else ""
        around = {
            "system": (start.removeprefix(opening), after_system.removesuffix(user_before)),
            "user": (user_before, user_after),
            "assistant": (after_user.removeprefix(user_after), after_answer.removesuffix(user_before)),
        }
        turns = Turns(
            opening,
            alone.removesuffix(user_before).removeprefix(opening),
            around,
            end.removeprefix(user_after),
        )
        if any(turns.render(said(roles)) != render(roles) for roles in PROBES):
            raise ValueError("a conversation is more than its turns one after another")
        if any(mark in render(PROBES[-1]) + turns.default_system for mark in ("{{", '"""')):
            raise ValueError("it has marks of Modelfiles in its own text")
    except (ValueError, TemplateError) as error:
        raise ValueError(
            f"format=ollama: the chat template cannot be said in a Modelfile ({error}); use format={instead}, "
            "which carries it"
        ) from error
    return turns


def modelfile(base: str, adapter: str | None, layout: PromptLayout, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the Modelfile of a base (a path, or a name of Ollama's) with the trained prompt and stop tokens.

    Raises ValueError for a prompt that Ollama would read otherwise.
    """
    lines, instead = [f"FROM {base}"], "gguf" if adapter is None else "gguf_lora"
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    template = turns_of(layout, tokenizer, instead).go_template() if layout.kind == "chat" else "{{ .Prompt }}"
    lines.append(f"TEMPLATE {quoted(template, 'chat template', instead)}")
    if layout.kind == "chat" and layout.system_prompt is not None:
        lines.append(f"SYSTEM {quoted(layout.system_prompt, 'system prompt', instead)}")
    lines += [f"PARAMETER stop {quoted(text, 'stop text', instead)}" for text in stop_texts(layout, tokenizer)]
    return "\n".join(lines) + "\n"


def quoted(text: str, what: str, instead: str) -> str:
    """Return a text as a Modelfile says it. Raises ValueError for one that cannot stand there.

    Ollama's parser knows no escapes, and keeps of the characters that do not print (a no-break or ideographic space, a
    joiner of emoji) tabs and line ends alone.
    """
    if '"""' in text:
        raise ValueError(f'format=ollama: a Modelfile cannot say a {what} with """ in it; use format={instead}')
    if lost := sorted({f"U+{ord(c):04X}" for c in text if not c.isprintable() and c not in "\t\n\r"}):
        raise ValueError(
            f"format=ollama: Ollama drops {', '.join(lost)} of the {what} when it reads a Modelfile; train without, or "
            f"use format={instead}, which carries it"
        )
    return f'"""{text}"""'
