"""`lightning-peft generate`: answers to one prompt, a file of prompts, or an interactive chat."""

import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lightning_peft.checkpoint.atomic import check_can_write, write_text
from lightning_peft.command_configs.of_answers import GenerateConfig
from lightning_peft.commands.adapted import best_of_sweep, continues_text, layout_of, load_for_inference
from lightning_peft.data.conversation import BadRow, Conversation, Message, Row
from lightning_peft.data.files import find_files, read_rows
from lightning_peft.data.layout import PromptLayout
from lightning_peft.data.prompt_rows import prompts_of, read_prompt
from lightning_peft.inference.drawn import check_draws, generate_drawn
from lightning_peft.inference.generate import generate_batch, generate_stream
from lightning_peft.progress import Part
from lightning_peft.strict_json import json_line

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """A prompt, or one line of `prompt_path`."""

    row: dict[str, Any]
    """The values that are written beside the answer."""
    messages: Conversation
    """The conversation to go on with."""

    def conversation(self, layout: PromptLayout) -> Conversation:
        """Return the conversation in an adapter's layout: with its system prompt where the row has none."""
        if layout.kind != "chat":
            asked = layout.conversation(self.messages[-1].content)
        else:
            asked = layout.going_on(self.messages, self.messages.tools or None)
        return self.messages.at_its_place(asked)


@torch.no_grad()
def generate(config: GenerateConfig) -> None:
    """Stream the answer to `prompt`, write those to the lines of `prompt_path`, or chat until an empty line."""
    if config.adapter_path is not None:
        config = replace(config, adapter_path=best_of_sweep(config.adapter_path))
    prompts = read_prompts(config.prompt_path, continues_text(config.adapter_path, config.model))
    if prompts is None and config.prompt is None and sys.stdin is None:
        raise ValueError("prompt=null: a chat reads from stdin, which is closed; give prompt= or prompt_path=")
    if config.output is not None and prompts is None:
        raise ValueError(f"output={config.output}: only the answers to prompt_path go to a file")
    if config.output is not None:
        check_can_write(Path(config.output))
    model, tokenizer = load_for_inference(config.adapter_path, config.model, config.precision)
    if config.passes > 1:
        check_draws(model, config.passes)
    layout = layout_of(config.adapter_path, tokenizer, config.model)
    if config.system_prompt is not None:
        if layout.kind != "chat":
            raise ValueError(f"system_prompt={config.system_prompt!r}: the adapter was trained on text without turns")
        layout = replace(layout, system_prompt=config.system_prompt)
    if config.passes > 1:
        drawn(model, tokenizer, layout, config, prompts)
    elif config.prompt is not None:
        stream(model, tokenizer, layout, layout.conversation(config.prompt), config)
    elif prompts is not None:
        ids = prompts_of([prompt.conversation(layout) for prompt in prompts], layout, tokenizer)
        answers = generate_batch(model, tokenizer, ids, config.sampling, stops=layout.stop_token_ids)
        write_answers([prompt.row for prompt in prompts], answers, config.output)
    else:
        chat(model, tokenizer, layout, config)


def drawn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    layout: PromptLayout,
    config: GenerateConfig,
    prompts: list[Prompt] | None,
) -> None:
    """Answer by the mean of several draws; say how unsure they are beside each answer."""
    asked = [text_prompt(config.prompt or "")] if prompts is None else prompts
    tokens = prompts_of([prompt.conversation(layout) for prompt in asked], layout, tokenizer)
    rows, answers = [], []
    for number, (prompt, ids) in enumerate(zip(asked, tokens, strict=True)):
        sampling = config.sampling.of_answer(number)
        with Part("drawing an answer", sampling.max_new_tokens) as part:
            found = generate_drawn(model, tokenizer, ids, sampling, config.passes, part.advance, layout.stop_token_ids)
        figures = {key: value for key, value in asdict(found).items() if key != "text"}
        rows.append(prompt.row | figures)
        answers.append(found.text)
    if prompts is not None:
        write_answers(rows, answers, config.output)
        return
    print(answers[0])
    said = f"entropy {rows[0]['entropy']:.3f} nats a token, of which {rows[0]['disagreement']:.3f} is disagreement of "
    print(f"{said}{config.passes} draws; confidence {rows[0]['confidence']:.1%}", file=sys.stderr)


def text_prompt(text: str) -> Prompt:
    return Prompt({"prompt": text}, Conversation([Message("user", text)]))


def read_prompts(path: str | None, is_raw: bool = False) -> list[Prompt] | None:
    """Return the prompts of a text file, a line each, or of JSON lines. Raises ValueError for a file without prompts.

    is_raw: prompts are texts that are continued, without turns.
    """
    if path is None:
        return None
    if not Path(path).is_file():
        raise ValueError(f"prompt_path={path}: no such file; give a text file with one prompt a line, or JSON lines")
    if Path(path).suffix in (".jsonl", ".ndjson"):
        rows = [row for file in find_files("prompt_path", path) for row in read_rows(file)]
        prompts = [prompt_of_row(row, is_raw) for row in rows]
        if not prompts:
            raise ValueError(f"prompt_path={path}: the file has no row; write one JSON object a line")
        if names := not_part_of(prompts):
            logger.info("prompt_path=%s: not part of the prompts, and written beside the answers: %s", path, names)
        return prompts
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt_path={path}: not UTF-8 text ({error})") from error
    lines = [line for line in text.split("\n") if line.strip()]  # text mode has made one of \r\n and \r
    if not lines:
        raise ValueError(f"prompt_path={path}: the file has no line with text; write one prompt a line")
    return [text_prompt(line) for line in lines]


def not_part_of(prompts: Sequence[Prompt]) -> str:
    """Name the columns of rows that are not part of their prompts; empty where all are."""
    others = Counter(name for prompt in prompts for name in (*prompt.messages.unread, *prompt.messages.listed))
    return ", ".join(f"{name} ({count:,} rows)" for name, count in others.items())


def prompt_of_row(row: Row | BadRow, is_raw: bool) -> Prompt:
    """Return the prompt of a JSON row. Raises `BadRow`, also where the answer would be written over a value."""
    if isinstance(row, BadRow):
        raise row
    if "answer" in row.values:
        raise BadRow.because(row.origin, "has a key answer, which the answer is written to; rename it")
    return Prompt(row.values, read_prompt(row, is_raw))


def write_answers(rows: list[dict[str, Any]], answers: list[str], output: str | None) -> None:
    """Write each row with its answer as a JSON line, to a file or the terminal."""
    lines = [json_line(row | {"answer": answer}) for row, answer in zip(rows, answers, strict=True)]
    text = "\n".join(lines) + "\n"
    if output is None:
        sys.stdout.write(text)
    else:
        write_text(Path(output), text)


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    layout: PromptLayout,
    asked: Conversation,
    config: GenerateConfig,
) -> str:
    """Print the answer as it comes and return it."""
    pieces, prompt = [], layout.prompt(asked, tokenizer)
    for piece in generate_stream(model, tokenizer, prompt, config.sampling, layout.stop_token_ids):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return "".join(pieces)


ENDS_CHAT = ("", "exit", "quit", "/exit", "/quit", "/bye", ":q")
"""Lines that end a chat, those of other tools too."""


def chat(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, layout: PromptLayout, config: GenerateConfig
) -> None:
    """Answer line by line, each after the whole conversation; text without turns is continued line by line."""
    conversation = Conversation()
    print("An empty line or exit ends the chat.", file=sys.stderr)
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if line.strip().lower() in ENDS_CHAT:
            return
        if line.strip() in ("/help", "/?"):
            print("An empty line or exit ends the chat; every other line is a question.", file=sys.stderr)
            continue
        asked = layout.conversation(line)
        if conversation and layout.kind == "chat":
            asked = Conversation([*conversation, asked[-1]], asked.tools)
        answer = stream(model, tokenizer, layout, asked, config)
        conversation = Conversation([*asked, Message("assistant", answer)], asked.tools)
