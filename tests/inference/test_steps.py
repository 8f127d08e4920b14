"""Rows of unlike lengths on one cache of transformers: each has the scores that its text has alone."""

import pytest
import torch
from families import EVERY, small_model

from lightning_peft.inference.continuous_batching import Decoder, RunningSequence
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.inference.steps import AnewSteps, PlainSteps, can_pad_left

pytestmark = pytest.mark.filterwarnings("ignore")

WINDOWS = "mistral qwen2 gemma2 gemma3_text gemma3n_text gemma4_text gpt_oss cohere2 olmo3 exaone4 llama4_text".split()
"""Families with a window of 5 tokens, some of them in every second block, some with keys that blocks share."""
WHOLE = "gpt2 gpt_neox opt phi granite deepseek_v3 qwen3_moe".split()
OPTIONS = {
    "llama4_text": {"attention_chunk_size": 5},
    "qwen2": {"layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.mark.parametrize("family", [*WHOLE, *WINDOWS])
def test_rows_come_and_go_beside_one_another(family: str) -> None:
    """A row leaves, another comes, and the longest leaves, on prompts within the window and beyond it."""
    model = small_model(family, **OPTIONS.get(family, {}))
    assert can_pad_left(model)
    steps = PlainSteps(model, None)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 90, (size,), generator=generator).tolist() for size in (3, 12, 2)]

    def take(tokens: list[int]) -> None:
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)
        check(model, texts, steps.step(tokens, [-1] * len(tokens)))

    with torch.inference_mode():
        check(model, texts, steps.begin(texts, [-1] * 3))
        take([30, 31, 32])
        take([40, 41, 42])
        steps.keep([0, 1])
        texts = [*texts[:2], [20, 21, 22, 23, 24, 25, 26]]
        check(model, texts[2:], steps.begin(texts[2:], [-1]))
        take([50, 51, 52])
        steps.keep([0, 2])
        texts = [texts[0], texts[2]]
        for token in range(60, 66):
            take([token, token + 10])


def check(model, texts: list[list[int]], scores: torch.Tensor) -> None:
    expected = torch.cat([model(input_ids=torch.tensor([text]), use_cache=False).logits[:, -1] for text in texts])
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)  # fp32: sums of other orders


@pytest.mark.slow
@pytest.mark.parametrize("family", EVERY)
def test_every_family_is_decoded_beside_others_as_alone(family: str) -> None:
    """Whatever its cache is: by steps that take a batch, one at a time, or from all tokens anew."""
    try:
        model = small_model(family)
    except Exception as error:
        pytest.skip(f"needs another size: {type(error).__name__}")
    decoder = Decoder(model)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 90, (size,), generator=generator).tolist() for size in (3, 14, 8)]
    rows = [RunningSequence(prompt, SamplingConfig(max_new_tokens=5), lambda _: True) for prompt in prompts]
    for group in [rows] if decoder.can_batch else [[row] for row in rows]:
        decoder.add(*group)
        while decoder.rows:
            decoder.step()
    anew = AnewSteps(model, None)
    for row in rows:
        with torch.inference_mode():
            for place in range(5):
                scores = anew.begin([[*row.prompt, *row.tokens[:place]]], [-1])[0].float()
                assert scores[row.tokens[place]] >= scores.max() - 1e-3 * scores.abs().max()
