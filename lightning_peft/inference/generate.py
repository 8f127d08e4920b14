"""Text from a causal language model: batches of prompts, or one streamed token by token."""

import copy
import inspect
from collections.abc import Iterator
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
)

from lightning_peft.data.chat import end_token_ids
from lightning_peft.inference.sampling import SamplingConfig


def declared_end_ids(model: PreTrainedModel) -> set[int]:
    """Tokens at which the model's own `generation_config.json` says that an answer ends."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def generation_config(
    sampling: SamplingConfig, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
) -> GenerationConfig:
    draws = sampling.temperature > 0
    options = {"temperature": sampling.temperature, "top_p": sampling.top_p} if draws else {}
    ends = sorted(end_token_ids(tokenizer) | declared_end_ids(model))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=draws,
        eos_token_id=ends,
        pad_token_id=pad,
        **options,
    )


def pad_inside(prompts: list[list[int]], prefix: int, pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """input_ids and attention_mask, (B, T) int64: the common prefix, then padding, then the rest at the right edge."""
    width = max(map(len, prompts))
    gaps = [width - len(prompt) for prompt in prompts]
    ids = [p[:prefix] + [pad_id] * gap + p[prefix:] for p, gap in zip(prompts, gaps, strict=True)]
    mask = [[1] * prefix + [0] * gap + [1] * (width - prefix - gap) for gap in gaps]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def common_prefix(prompts: list[list[int]]) -> int:
    """Number of leading tokens all prompts share, at least one token of each prompt left out."""
    first, last = min(prompts), max(prompts)
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return min(shared, min(map(len, prompts)) - 1)


def cache_keyword(model: PreTrainedModel) -> str:
    """What the model calls the cache it is given; transformers renamed it in 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@torch.inference_mode()
def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    sampling: SamplingConfig,
    batch_size: int = 32,
) -> list[str]:
    """The answer to each prompt (token ids), in the order given.

    What all prompts begin with - a system prompt, solved examples - runs through the model once.
    """
    if not prompts:
        return []
    config = generation_config(sampling, tokenizer, model)
    prefix = common_prefix(prompts)
    cached, prefix_cache = cache_keyword(model), DynamicCache(config=model.config)
    if prefix:
        model(input_ids=torch.tensor([prompts[0][:prefix]], device=model.device), **{cached: prefix_cache})
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    torch.manual_seed(sampling.seed)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        inputs: dict[str, Any] = pad_inside([prompts[i] for i in rows], prefix, config.pad_token_id, model.device)
        if prefix:
            inputs[cached] = copy.deepcopy(prefix_cache)
            inputs[cached].batch_repeat_interleave(len(rows))
        output = model.generate(**inputs, generation_config=config)  # type: ignore[operator]
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text in zip(rows, texts, strict=True):
            answers[row] = text
    return answers


def generate_stream(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: list[int], sampling: SamplingConfig
) -> Iterator[str]:
    """Pieces of the answer to one prompt (token ids) as they come."""
    config = generation_config(sampling, tokenizer, model)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []

    def run() -> None:
        try:
            torch.manual_seed(sampling.seed)
            with torch.inference_mode():
                inputs = pad_inside([prompt], 0, config.pad_token_id, model.device)
                model.generate(**inputs, generation_config=config, streamer=streamer)  # type: ignore[operator]
        except BaseException as error:  # handed to the caller's thread below
            failure.append(error)
            streamer.end()

    thread = Thread(target=run, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failure:
        raise failure[0]
