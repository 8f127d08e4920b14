"""Answers of a BaLoRA adapter whose tokens are chosen by the mean of several draws, and how sure it is of them."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lightning_peft.adapters.balora import InputVariance, sampling
from lightning_peft.inference.answer_rows import ends_of
from lightning_peft.inference.continuous_batching import NOT_FINITE, draw
from lightning_peft.inference.own_settings import room_for
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.inference.token_ids import check_token_ids


@dataclass(frozen=True)
class Drawn:
    """An answer, and its means over tokens; its end token is one of them."""

    text: str
    entropy: float
    """Entropy of the mean of the draws' probabilities, in nats: how unsure the adapter is."""
    disagreement: float
    """`entropy` less the mean of the draws' own entropies: the part that draws do not agree on."""
    confidence: float
    """Probability of the chosen token."""


def check_draws(model: PreTrainedModel, passes: int) -> None:
    """Raise ValueError for a model that draws nothing."""
    if not any(isinstance(module, InputVariance) for module in model.modules()):
        raise ValueError(
            f"passes={passes}: draws are of an adapter of method=balora, and this model has none; leave it out, or "
            "let `lightning-peft calibrate dropout=0.1` score passes with dropout"
        )


@torch.inference_mode()
def generate_drawn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompt: list[int],
    options: SamplingConfig,
    passes: int,
    on_step: Callable[[], Any] = lambda: None,
    stops: Collection[int] = (),
) -> Drawn:
    """Return the answer to one prompt, each of its tokens from the mean of the probabilities that `passes` draws give.

    The variance follows the whole text so far, so that every step computes it anew, without a cache. Raises ValueError
    where a probability is not finite.
    """
    generator = torch.Generator().manual_seed(options.seed)
    ends = ends_of(model, tokenizer, stops)
    check_token_ids(model, [prompt])
    (longest,) = room_for(model, [prompt], options.max_new_tokens)
    answer: list[int] = []
    sums = torch.zeros(3, dtype=torch.float64)
    with torch.random.fork_rng(devices=[]), sampling(model):
        torch.manual_seed(options.seed)
        while len(answer) < longest and (not answer or answer[-1] not in ends):
            rows = torch.tensor([[*prompt, *answer]] * passes, device=model.device)
            probabilities = model(input_ids=rows, use_cache=False).logits[:, -1].float().softmax(-1).cpu()
            mean = probabilities.mean(0)
            if not mean.isfinite().all():
                raise ValueError(NOT_FINITE)
            token = draw(mean.clamp_min(torch.finfo(mean.dtype).tiny).log(), options, generator)
            unsure = entropy(mean)
            sums += torch.stack([unsure, unsure - entropy(probabilities).mean(), mean[token]]).double()
            answer.append(token)
            on_step()
    found = (sums / len(answer)).tolist()
    said = answer[:-1] if answer[-1] in ends else answer
    return Drawn(str(tokenizer.decode(said, skip_special_tokens=True)), *found)


def entropy(probabilities: Tensor) -> Tensor:
    """Return the entropy of each row of probabilities, in nats."""
    return torch.special.entr(probabilities).sum(-1)
