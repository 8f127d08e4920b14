"""`lightning-peft generate`: answers to one prompt, a file of prompts, or an interactive chat."""

import json
import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lightning_peft.commands.adapted import load_for_inference, saved_config
from lightning_peft.config import GenerateConfig
from lightning_peft.data.chat import encode_prompt
from lightning_peft.data.formats import Message
from lightning_peft.inference.generate import generate_batch, generate_stream


def generate(config: GenerateConfig) -> None:
    """Stream the answer to `prompt`, write those to the lines of `prompt_path`, or chat until an empty line."""
    prompts = read_prompts(config.prompt_path)
    if config.output is not None and prompts is None:
        raise ValueError(f"output={config.output}: only the answers to prompt_path go to a file")
    saved = saved_config(config.adapter_path)
    system = config.system_prompt
    if system is None and saved is not None:
        system = saved.data.system_prompt
    start = [Message("system", system)] if system else []
    model, tokenizer = load_for_inference(config.adapter_path, config.model, config.precision)
    torch.set_grad_enabled(False)
    if config.prompt is not None:
        stream(model, tokenizer, [*start, Message("user", config.prompt)], config)
    elif prompts is not None:
        ids = [encode_prompt([*start, Message("user", prompt)], tokenizer) for prompt in prompts]
        write_answers(prompts, generate_batch(model, tokenizer, ids, config.sampling), config.output)
    else:
        chat(model, tokenizer, start, config)


def read_prompts(path: str | None) -> list[str] | None:
    if path is None:
        return None
    if not Path(path).is_file():
        raise ValueError(f"prompt_path={path}: no such file; give a text file with one prompt a line")
    prompts = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
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
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, messages: list[Message], config: GenerateConfig
) -> str:
    """Print the answer as it comes and return it."""
    pieces = []
    for piece in generate_stream(model, tokenizer, encode_prompt(messages, tokenizer), config.sampling):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return "".join(pieces)


def chat(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, messages: list[Message], config: GenerateConfig
) -> None:
    print("An empty line ends the chat.", file=sys.stderr)
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if not line.strip():
            return
        messages = [*messages, Message("user", line)]
        messages = [*messages, Message("assistant", stream(model, tokenizer, messages, config))]
