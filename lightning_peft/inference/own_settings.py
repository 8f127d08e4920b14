"""A model's own generation config beside what is asked for: end tokens, settings that change scores, positions."""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.models.rope import table_of_positions

logger = logging.getLogger(__name__)

CHANGE_SCORES = (
    "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens",
    "begin_suppress_tokens", "sequence_bias", "forced_bos_token_id", "forced_eos_token_id", "min_length",
    "min_new_tokens", "exponential_decay_length_penalty", "token_healing", "watermarking_config", "guidance_scale",
)  # fmt: skip
"""Settings of a model's own generation config by which transformers changes the scores, also of greedy answers."""


def declared_end_ids(model: PreTrainedModel) -> set[int]:
    """Return the tokens at which the model's own `generation_config.json` says that an answer ends."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def generation_config(
    sampling: SamplingConfig, ends: Collection[int], tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
) -> GenerationConfig:
    """Return what transformers' `generate` is told; the choice of tokens is ours, also where they are drawn."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        **own_scores(model),
    )


def own_scores(model: PreTrainedModel) -> dict[str, Any]:
    """Return what the model's own generation config sets of `CHANGE_SCORES`."""
    declared = model.generation_config
    return {name: value for name in CHANGE_SCORES if (value := getattr(declared, name, None)) is not None}


def room_for(model: PreTrainedModel, prompts: list[list[int]], most: int) -> list[int]:
    """Return how many of `most` tokens each prompt's answer may have, as a model's positions may come to an end.

    Raises ValueError for a prompt that leaves none.
    """
    if (positions := table_of_positions(model)) is None:
        return [most] * len(prompts)
    if (longest := max(map(len, prompts))) >= positions:
        raise ValueError(
            f"a prompt has {longest:,} tokens, and {type(model).__name__} has {positions:,} positions for prompt and "
            "answer: shorten the prompt"
        )
    return [min(most, positions - len(prompt)) for prompt in prompts]


@contextmanager
def only_what_is_asked(model: PreTrainedModel) -> Iterator[None]:
    """Keep the model's `generate`, inside the block, from any setting of the model's own generation config.

    Without it, `generate` takes all that it is not told from there: beams, several answers, times, kinds of caches and
    of outputs.
    """
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def settings_not_decoded(model: PreTrainedModel) -> dict[str, Any]:
    """Return what changes answers of a model's own generation config, and our decoder does not know."""
    changed = own_scores(model)
    if stops := getattr(model.generation_config, "stop_strings", None):
        changed["stop_strings"] = stops
    return {name: value for name, value in changed.items() if value and (value != 1.0 or "penalty" not in name)}
