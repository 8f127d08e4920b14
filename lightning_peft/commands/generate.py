"""`lightning-peft generate`: answers to one prompt, a file of prompts, or an interactive chat."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lightning_peft.commands.adapted import layout_of, load_for_inference
from lightning_peft.config import GenerateConfig
from lightning_peft.data.conversation import Conversation, Message
from lightning_peft.data.layout import PromptLayout
from lightning_peft.inference.generate import generate_batch, generate_stream


def generate(config: GenerateConfig) -> None:
    """Stream the answer to `prompt`, write those to the lines of `prompt_path`, or chat until an empty line."""
    prompts = read_prompts(config.prompt_path)
    if config.output is not None and prompts is None:
        raise ValueError(f"output={config.output}: only the answers to prompt_path go to a file")
    model, tokenizer = load_for_inference(config.adapter_path, config.model, config.precision)
    layout = layout_of(config.adapter_path, tokenizer)
    if config.system_prompt is not None:
        if layout.kind != "chat":
            raise ValueError(f"system_prompt={config.system_prompt!r}: the adapter was trained on text without turns")
        layout = replace(layout, system_prompt=config.system_prompt)
    torch.set_grad_enabled(False)
    if config.prompt is not None:
        stream(model, tokenizer, layout.prompt(layout.conversation(config.prompt), tokenizer), config)
    elif prompts is not None:
        ids = [layout.prompt(layout.conversation(prompt), tokenizer) for prompt in prompts]
        write_answers(prompts, generate_batch(model, tokenizer, ids, config.sampling), config.output)
    else:
        chat(model, tokenizer, layout, config)


def read_prompts(path: str | None) -> list[str] | None:
    if path is None:
        return None
    if not Path(path).is_file():
        raise ValueError(f"prompt_path={path}: no such file; give a text file with one prompt a line")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt_path={path}: not UTF-8 text ({error})") from error
    prompts = [line for line in text.split("\n") if line.strip()]  # text mode has made one of \r\n and \r
    if not prompts:
        raise ValueError(f"prompt_path={path}: the file has no line with text; write one prompt a line")
    return prompts


def write_answers(prompts: list[str], answers: list[str], output: str | None) -> None:
    lines = [
        json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    text = "\n".join(lines) + "\n"
    if output is None:
        sys.stdout.write(text)
    else:
        Path(output).write_text(text, encoding="utf-8")


def stream(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: list[int], config: GenerateConfig
) -> str:
    """Print the answer as it comes and return it."""
    pieces = []
    for piece in generate_stream(model, tokenizer, prompt, config.sampling):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return "".join(pieces)


def chat(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, layout: PromptLayout, config: GenerateConfig
) -> None:
    """Answer line by line, each after the whole conversation; text without turns is continued line by line."""
    conversation = Conversation()
    print("An empty line ends the chat.", file=sys.stderr)
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if not line.strip():
            return
        asked = layout.conversation(line)
        if conversation and layout.kind == "chat":
            asked = Conversation([*conversation, asked[-1]], asked.tools)
        answer = stream(model, tokenizer, layout.prompt(asked, tokenizer), config)
        conversation = Conversation([*asked, Message("assistant", answer)], asked.tools)
