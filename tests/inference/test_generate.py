"""Generation in batches: each answer is the one its prompt gets alone."""

import copy

import pytest
import torch
from families import small_model
from transformers import GenerationConfig

import lightning_peft.inference.static_steps as steps_module
from lightning_peft.adapters.inject import adapters, disable_adapters, inject_adapters
from lightning_peft.adapters.registry import METHODS
from lightning_peft.inference.answer_rows import AnswerRows
from lightning_peft.inference.by_transformers import generated_tokens, say_once, takes_cache
from lightning_peft.inference.continuous_batching import draw, smallest_set
from lightning_peft.inference.generate import generate_batch, generate_stream, why_not_decoded
from lightning_peft.inference.prompt_batches import Batching, choose_batching, common_prefix
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.inference.static_steps import StaticSteps, why_not_static
from lightning_peft.models.loading import load_model, load_tokenizer
from lightning_peft.models.source import ModelConfig
from lightning_peft.quantization.config import Kind, QuantizationConfig

TINY = ModelConfig(name="tiny")


@pytest.fixture(scope="module")
def model():
    return load_model(TINY, torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


def greedy_alone(model, tokenizer, prompt, count):
    """Decode greedily without cache or padding."""
    ids = list(prompt)
    for _ in range(count):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize("generate", [generate_batch, lambda *words: list(generate_stream(*words))])
def test_token_without_an_embedding_is_one_line(model, tokenizer, generate):
    count = model.get_input_embeddings().num_embeddings
    foreign = count + 3
    prompt = [3, foreign] if generate is not generate_batch else [[3, 4], [3, foreign]]
    with pytest.raises(
        ValueError, match=f"a token with the id {foreign}, and the model has embeddings for {foreign - 3}"
    ):
        generate(model, tokenizer, prompt, SamplingConfig(max_new_tokens=2))


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
    class Broken(RuntimeError):
        """The error of a layer."""

    calls = []

    def fail(*_):
        calls.append(None)
        if len(calls) > 4:  # the first few see whether the model runs with a cache
            raise Broken

    sampling = SamplingConfig(max_new_tokens=8)
    answers = AnswerRows(model, tokenizer, [tokenizer("the cat")["input_ids"]], sampling)
    hook = model.get_output_embeddings().register_forward_pre_hook(fail)
    try:
        with pytest.raises(Broken):
            list(generated_tokens(model, answers, sampling))
    finally:
        hook.remove()


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


STATIC = ["llama", "qwen2", "qwen3", "mistral"]


def static_model(family):
    """Return a model of a family whose attention sees all positions."""
    model = small_model(family, sliding_window=None, use_sliding_window=False)
    assert why_not_static(model) is None
    return model


def draw_adapter(model, method="lora"):
    """Draw adapters of all linear layers that change what the model says."""
    inject_adapters(model, METHODS[method].config(method=method, rank=4))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=generator)
    return model.eval()


@pytest.mark.parametrize("family", STATIC)
@pytest.mark.parametrize("method", [None, "lora", "dora"])
def test_steps_on_a_static_cache_are_those_of_the_model(family, method):
    """Prompts are of unlike lengths, a row leaves, one comes: the scores are those of each row's text alone."""
    model = static_model(family)
    if method is not None:
        draw_adapter(model, method)
    steps = StaticSteps(model)
    texts = [[5, 6, 7, 8, 9], [11, 12], [5, 6, 20, 21, 22, 23, 24, 25, 26]]
    with torch.inference_mode():
        steps.share([5, 6])
        check(model, texts, steps.begin(texts, [-1] * 3))
        texts = [[*text, token] for text, token in zip(texts, (30, 31, 32), strict=True)]
        check(model, texts, steps.step([30, 31, 32], [-1] * 3))
        steps.keep([0, 2])
        texts = [texts[0], texts[2], [5, 6, 40]]
        check(model, texts[2:], steps.begin(texts[2:], [-1]))
        texts = [[*text, token] for text, token in zip(texts, (33, 34, 35), strict=True)]
        check(model, texts, steps.step([33, 34, 35], [-1] * 3))


def check(model, texts, scores):
    expected = torch.stack([model(input_ids=torch.tensor([text])).logits[0, -1] for text in texts])
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)  # fp32: sums of other orders


def test_factors_are_read_anew_for_each_call(tokenizer):
    """A change of an adapter by training changes the answers that follow."""
    model, prompts = draw_adapter(static_model("llama")), [[5, 6, 7], [5, 6, 9, 10]]
    first = generate_batch(model, tokenizer, prompts, SamplingConfig(max_new_tokens=12))
    for _, adapter in adapters(model):
        adapter.lora_B.weight.data.neg_()
    second = generate_batch(model, tokenizer, prompts, SamplingConfig(max_new_tokens=12))
    assert first != second == [greedy_alone(model, tokenizer, prompt, 12) for prompt in prompts]
    with disable_adapters(model):
        base = generate_batch(model, tokenizer, prompts, SamplingConfig(max_new_tokens=12))
        assert second != base == [greedy_alone(model, tokenizer, prompt, 12) for prompt in prompts]


def test_more_prompts_than_places_take_those_of_answers_that_ended(tokenizer):
    model = static_model("llama")
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 90, (length,), generator=generator).tolist() for length in range(2, 15)]
    answers = generate_batch(model, tokenizer, prompts, SamplingConfig(max_new_tokens=8), batch_size=4)
    assert answers == [greedy_alone(model, tokenizer, prompt, 8) for prompt in prompts]


def test_a_cache_takes_as_many_rows_as_memory_is_meant_for(monkeypatch):
    """It takes as much as the weights where no more is meant for it in any case."""
    model = static_model("llama")
    row = 2 * 2 * 2 * 16 * 4 * 32  # layers, keys and values, heads, head_dim, bytes, positions
    monkeypatch.setattr(steps_module, "CACHE_BYTES", 0)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert StaticSteps(model).reserve(10**6, 32) == weights // row
    assert StaticSteps(model).reserve(2, 32) == 2


def test_a_quantised_base_answers_in_a_batch_as_alone(tokenizer):
    model = load_model(TINY, torch.float32, QuantizationConfig(kind=Kind.nf4)).eval()
    draw_adapter(model)
    prompts = [[5, 6, 7], [5, 6, 9, 10, 11]]
    answers = generate_batch(model, tokenizer, prompts, SamplingConfig(max_new_tokens=8))
    assert answers == [greedy_alone(model, tokenizer, prompt, 8) for prompt in prompts]


def test_a_family_that_transformers_answers_for_is_named_once(tokenizer, caplog):
    say_once.cache_clear()
    model = small_model("mamba")
    with caplog.at_level("INFO"):
        for _ in range(2):
            generate_batch(model, tokenizer, [[5, 6, 7]], SamplingConfig(max_new_tokens=2))
    assert [r.message for r in caplog.records if "transformers' generate" in r.message] == [
        "MambaForCausalLM: answers come from transformers' generate, slower, as its blocks are not Llama's"
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "options"),
    [("xlstm", {}), ("lfm2", {"layer_types": ["conv", "conv"], "block_auto_adjust_ff_dim": False})],
    ids=["recurrent", "convolutions_alone"],
)
def test_a_family_whose_cache_fails_answers_without_one(family, options, tokenizer, caplog):
    say_once.cache_clear()
    model = small_model(family, vocab_size=320, **options)
    prompts = [[5, 6, 7], [5, 6, 9, 10, 11], [8, 20, 30]]
    with caplog.at_level("INFO"):
        answers = generate_batch(model, tokenizer, prompts, SamplingConfig(max_new_tokens=5))
        streamed = ["".join(generate_stream(model, tokenizer, p, SamplingConfig(max_new_tokens=5))) for p in prompts]
    expected = [greedy_alone(model, tokenizer, prompt, 5) for prompt in prompts]
    assert answers == streamed == expected and any(expected)
    assert any("each token is computed from all before it" in record.message for record in caplog.records)


def test_a_model_that_cannot_answer_says_why(tokenizer, monkeypatch):
    model = small_model("mamba")

    def fail(*inputs, **options):
        raise RuntimeError("sizes of tensors\nmust match")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(ValueError, match="MambaForCausalLM gives no answers: sizes of tensors must match"):
        generate_batch(model, tokenizer, [[5, 6, 7]], SamplingConfig(max_new_tokens=2))


def test_a_penalty_that_the_model_declares_is_kept(tokenizer):
    """Scores that transformers changes are left to it, also where answers are greedy."""
    model = static_model("qwen2")
    assert why_not_decoded(model) is None
    model.generation_config.repetition_penalty = 1.1
    assert why_not_decoded(model) == "its generation_config.json sets repetition_penalty"


def test_equal_prompts_of_a_call_draw_different_answers(model, tokenizer):
    sampling = SamplingConfig(max_new_tokens=16, temperature=1.0)
    first, second = generate_batch(model, tokenizer, [[5, 6, 7], [5, 6, 7]], sampling)
    assert first != second


@pytest.mark.filterwarnings("ignore")
def test_an_answer_that_ends_early_is_compared_up_to_its_end():
    """The shortest prompt's answer alone ends with its second token, beside a longer one the batch goes on."""
    model, prompts = small_model("apertus"), [[5, 6, 7], [8, 70, 20, 30, 40, 46]]
    answer = model.generate(torch.tensor(prompts[:1]), max_new_tokens=2, do_sample=False, eos_token_id=None)
    model.generation_config.eos_token_id = [int(answer[0, -1])]
    assert choose_batching(model, prompts, 0).batching is not Batching.alone


def test_a_full_memory_is_no_fault_of_the_cache(model, monkeypatch):
    def full(**inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "generate", full)
    with pytest.raises(torch.OutOfMemoryError):
        takes_cache(model, [1, 2, 3], 0)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_only_what_is_asked_is_taken_from_the_generation_config(family, tokenizer):
    """Beams, several answers, a time and other outputs would come out of transformers' generate otherwise."""
    model = small_model(family)
    prompts = [[5, 6, 7], [5, 6, 9, 10, 11]]
    greedy, drawn = SamplingConfig(max_new_tokens=8), SamplingConfig(max_new_tokens=8, temperature=2.0)
    expected = [generate_batch(model, tokenizer, prompts, sampling) for sampling in (greedy, drawn)]
    declared = {
        "num_beams": 3, "num_return_sequences": 2, "do_sample": True, "top_k": 1, "max_time": 1e-9, "max_length": 4,
        "cache_implementation": "quantized", "prompt_lookup_num_tokens": 2, "return_dict_in_generate": True,
    }  # fmt: skip
    model.generation_config = GenerationConfig(**declared)
    assert [generate_batch(model, tokenizer, prompts, sampling) for sampling in (greedy, drawn)] == expected
    assert "".join(generate_stream(model, tokenizer, prompts[0], greedy)) == expected[0][0]
    assert all(getattr(model.generation_config, name) == value for name, value in declared.items())


def test_draws_are_of_all_tokens_in_every_family(tokenizer):
    """transformers draws among the 50 likeliest where nobody says how many."""
    model = small_model("gpt2")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all tokens alike: the likeliest are those of the smallest numbers
    answers = generate_batch(model, tokenizer, [[5, 6]] * 8, SamplingConfig(max_new_tokens=8, temperature=1.0))
    ids = tokenizer(answers, add_special_tokens=False)["input_ids"]
    assert len({token for row in ids for token in row}) > 25


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_answer_ends_at_the_texts_that_the_model_declares(family, tokenizer):
    model = small_model(family)
    prompts = [[5, 6, 7], [5, 6, 9, 10, 11]]
    whole = generate_batch(model, tokenizer, prompts, SamplingConfig(max_new_tokens=8))
    model.generation_config.stop_strings = [whole[0][2], whole[1][1]]
    cut = generate_batch(model, tokenizer, prompts, SamplingConfig(max_new_tokens=8))
    first = [min(text.find(stop) % 99 for stop in model.generation_config.stop_strings) for text in whole]
    assert cut == [text[: place + 1] for text, place in zip(whole, first, strict=True)]
    assert "".join(generate_stream(model, tokenizer, prompts[0], SamplingConfig(max_new_tokens=8))) == cut[0]


@pytest.mark.parametrize("family", ["gpt2", "opt", "gptj", "biogpt"])
def test_an_answer_ends_where_the_positions_of_a_table_end(family, tokenizer):
    """The models have 64 positions; the longest prompt leaves four, each answer is the one it is alone."""
    model = small_model(family)
    ids = torch.randint(3, 90, (64,), generator=torch.Generator().manual_seed(3)).tolist()
    prompts, sampling = [ids[:60], ids[:10], ids[:12]], SamplingConfig(max_new_tokens=12)
    answers = generate_batch(model, tokenizer, prompts, sampling)
    short = SamplingConfig(max_new_tokens=4)
    assert answers[0] == generate_batch(model, tokenizer, prompts[:1], short)[0]
    assert answers[1:] == generate_batch(model, tokenizer, prompts[1:], sampling)
    assert "".join(generate_stream(model, tokenizer, prompts[0], sampling)) == answers[0]
    with pytest.raises(ValueError, match="a prompt has 64 tokens, and .* has 64 positions for prompt and answer"):
        generate_batch(model, tokenizer, [ids], sampling)


def test_a_model_that_declares_no_end_and_a_tokenizer_without_one_answer(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template, tokenizer.eos_token, tokenizer.pad_token = None, None, None
    model = small_model("gpt2")
    model.generation_config = GenerationConfig()
    (answer,) = generate_batch(model, tokenizer, [[5, 6, 7]], SamplingConfig(max_new_tokens=8))
    assert answer == greedy_alone(model, tokenizer, [5, 6, 7], 8)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999, 0.99999])
def test_the_smallest_set_is_that_of_all_tokens_in_order(top_p):
    shares = (torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 2).softmax(-1)
    ordered, order = shares.sort(descending=True)
    expected = torch.zeros_like(shares)
    expected[order] = torch.where(ordered.cumsum(-1) - ordered < top_p, ordered, 0.0)
    assert torch.equal(smallest_set(shares, top_p), expected)


def test_scores_that_were_rounded_otherwise_draw_the_same():
    """Random numbers by rank went to other tokens where two had changed places: 83 of 100 draws were the same."""
    same = 0
    for seed in range(400):
        scores = torch.randn(2000, generator=torch.Generator().manual_seed(1000 + seed)) * 3
        sampling = SamplingConfig(temperature=0.8, top_p=0.95 if seed % 2 else 1.0)
        first, second = (
            draw(each, sampling, torch.Generator().manual_seed(seed)) for each in (scores, scores.bfloat16().float())
        )
        same += first == second
    assert same > 0.95 * 400


def test_draws_have_the_probabilities_of_the_scores():
    scores, generator = torch.tensor([1.0, 0.0, -1.0, 2.0]), torch.Generator().manual_seed(0)
    for sampling in (SamplingConfig(temperature=0.5), SamplingConfig(temperature=0.5, top_p=0.9)):
        counts = torch.zeros(4)
        for _ in range(4000):
            counts[draw(scores, sampling, generator)] += 1
        shares = (scores / 0.5).softmax(-1)
        if sampling.top_p < 1:  # the likeliest two have 0.98
            shares = torch.where(shares > 0.1, shares, 0.0)
            shares /= shares.sum()
        torch.testing.assert_close(counts / 4000, shares, rtol=0, atol=0.03)  # three standard deviations are 0.024
