"""Generation in batches: each answer is the one its prompt gets alone."""

import pytest
import torch
from families import small_model

from lightning_peft.inference.generate import (
    Batching,
    choose_batching,
    common_prefix,
    generate_batch,
    generate_stream,
)
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.models.loading import load_model, load_tokenizer
from lightning_peft.models.source import ModelConfig

TINY = ModelConfig(name="tiny")


@pytest.fixture(scope="module")
def model():
    return load_model(TINY, torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


def greedy_alone(model, tokenizer, prompt, count):
    """Plain greedy decoding without cache or padding."""
    ids = list(prompt)
    for _ in range(count):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


def test_batch_with_a_common_prefix_equals_each_prompt_alone(model, tokenizer):
    texts = ["the cat sat on the mat", "the cat ran", "the cat has a very long tail indeed", "the cat"]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    assert common_prefix(prompts) >= 6
    answers = generate_batch(model, tokenizer, prompts, SamplingConfig(max_new_tokens=8), batch_size=3)
    assert answers == [greedy_alone(model, tokenizer, prompt, 8) for prompt in prompts]


def test_batch_without_a_common_prefix_equals_each_prompt_alone(model, tokenizer):
    prompts = [tokenizer(text)["input_ids"] for text in ("one", "two birds in a tree", "alpha")]
    assert common_prefix(prompts) == 0
    answers = generate_batch(model, tokenizer, prompts, SamplingConfig(max_new_tokens=8))
    assert answers == [greedy_alone(model, tokenizer, prompt, 8) for prompt in prompts]


WINDOWS = ["mistral", "gemma2", "gemma3_text", "gpt_oss", "gpt_neo"]
RECURRENT = ["mamba", "mamba2", "lfm2", "falcon_h1", "bamba", "nemotron_h", "recurrent_gemma", "qwen3_next", "rwkv"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mpt", *WINDOWS, *RECURRENT])
def test_every_family_answers_in_a_batch_as_alone(family, tokenizer):
    """Prompts are longer than the window of 5, unlike in length, and share a beginning."""
    model = small_model(family)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 90, (5, 30), generator=generator).tolist()
    prompts = [ids[0][:12] + row[:length] for row, length in zip(ids, (3, 11, 20, 7, 11), strict=True)]
    answers = generate_batch(model, tokenizer, prompts, SamplingConfig(max_new_tokens=8))
    assert answers == [greedy_alone(model, tokenizer, prompt, 8) for prompt in prompts]


def test_the_shared_prefix_is_kept_where_the_cache_can_be_repeated(model):
    prompts = [[5, 6, 7, 8], [5, 6, 7, 9, 10, 11]]
    assert choose_batching(model, prompts, 0).batching is Batching.shared_prefix
    assert choose_batching(small_model("mistral"), prompts, 0).batching is Batching.left_padding


def test_stream_gives_the_answer_of_the_batch(model, tokenizer):
    prompt = tokenizer("the cat sat")["input_ids"]
    sampling = SamplingConfig(max_new_tokens=12)
    assert (
        "".join(generate_stream(model, tokenizer, prompt, sampling))
        == generate_batch(model, tokenizer, [prompt], sampling)[0]
    )


def test_stream_hands_on_the_error_of_its_thread(model, tokenizer):
    beyond = [model.config.vocab_size + 5]
    with pytest.raises(IndexError):
        list(generate_stream(model, tokenizer, beyond, SamplingConfig(max_new_tokens=2)))


def test_drawn_answers_depend_on_the_seed_only(model, tokenizer):
    prompts = [tokenizer("the cat")["input_ids"]]
    first, again, other = (
        generate_batch(model, tokenizer, prompts, SamplingConfig(max_new_tokens=16, temperature=1.0, seed=seed))
        for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize("option", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}])
def test_wrong_sampling_names_the_option(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"sampling.{name}="):
        SamplingConfig(**option)
