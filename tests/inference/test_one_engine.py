"""`generate`, `evaluate`, `samples` and `serve` give one answer: prompts, draws and ends are the same."""

import copy
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import small_model
from tokenizers import decoders
from transformers import AddedToken

from lightning_peft.adapters.inject import adapters, inject_adapters
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.adapters.slots import Slots
from lightning_peft.checkpoint.peft_format import save_adapter
from lightning_peft.commands.generate import Prompt
from lightning_peft.data.conversation import Conversation, Message
from lightning_peft.data.layout import PromptLayout
from lightning_peft.data.prompt_rows import prompts_of
from lightning_peft.evaluation.runner import answer_rows
from lightning_peft.inference.continuous_batching import Decoder
from lightning_peft.inference.generate import generate_batch, generate_stream, why_not_decoded
from lightning_peft.inference.own_settings import declared_end_ids
from lightning_peft.inference.sampling import SamplingConfig
from lightning_peft.inference.static_steps import StaticSteps
from lightning_peft.inference.steps import AnewSteps
from lightning_peft.models.tiny import CHAT_TEMPLATE, tiny_tokenizer
from lightning_peft.serving.bodies import Turn
from lightning_peft.serving.engine import Engine, GenerationRequest, Piece
from lightning_peft.serving.server import Serving
from lightning_peft.serving.server_config import ServerConfig
from lightning_peft.serving.tiers import AdapterTiers
from lightning_peft.tasks.task import Task, score_nothing
from lightning_peft.training.callbacks.validation_answers import ValidationAnswers

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {"vocab_size": 320, "max_position_embeddings": 512, "n_positions": 512, "max_seq_len": 512}
WIDE = {"sliding_window": None, "use_sliding_window": False}
NARROW = {"sliding_window": 24, "tie_word_embeddings": False}
FAMILIES = {
    "llama": {}, "llama_tied": {"tie_word_embeddings": True}, "qwen3": WIDE, "mistral": WIDE, "mistral_window": NARROW,
    "qwen2_window": {**NARROW, "layer_types": ["sliding_attention", "full_attention"]}, "gemma2": NARROW,
    "gemma3_text": NARROW, "gpt2": {}, "gpt_neox": {}, "mpt": {}, "mamba": {},
    "lfm2": {}, "falcon_h1": {}, "qwen3_next": {}, "recurrent_gemma": {}, "rwkv": {"rescale_every": 0}, "xlstm": {},
}  # fmt: skip
"""Llama's plan, sliding windows, tables of positions, biases for distances, recurrences; two whose cache is none of
transformers'."""
SLOW = ("recurrent_gemma", "qwen3_next", "rwkv", "xlstm")
EACH_FAMILY = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in FAMILIES]
TARGETS = {"mamba": ["in_proj"], "falcon_h1": ["q_proj", "v_proj"], "qwen3_next": ["q_proj", "v_proj"]}
"""Layers that a model calls; others it multiplies with by itself."""
TURNS = (
    [Message("user", "one")],
    [Message("user", "the cat sat on the mat, and " * 4)],
    [Message("user", "two birds"), Message("assistant", "in a tree"), Message("user", "three?")],
    [Message("system", "Be brief."), Message("user", "the cat")],
)
"""Conversations of unlike lengths, with a system message of their own and without."""
LAYOUT = PromptLayout(system_prompt="Answer in SQL.", template=CHAT_TEMPLATE, stop_token_ids=[2])
TOKENS = 7


def model_of(family: str, dtype: torch.dtype = torch.float32, **more):
    name = family.removesuffix("_tied").removesuffix("_window")
    options = {**SIZES, **FAMILIES[family], **more}
    model = small_model(name, **options)
    with torch.no_grad():
        for silent in (slice(0, 2), slice(259, None)):  # tokens without text are not said
            model.get_output_embeddings().weight[silent] = 0.0
    return model.to(dtype)


@torch.no_grad()
def adapted(family: str, folder: Path | None = None, dtype: torch.dtype = torch.float32):
    """Return a model with an adapter that changes what it says, saved to a folder."""
    model = model_of(family, dtype)
    config = LoRAConfig(rank=4, target_modules=TARGETS.get(family, "all_linear"))
    torch.manual_seed(1)
    inject_adapters(model, config)
    for _, layer in adapters(model):
        layer.lora_B.weight.normal_(std=0.1)
    if folder is not None:
        save_adapter(model, config, folder)
    return model.eval()


class Served:
    """The embedded engine of `serve` around an adapter's folder, asked as its endpoint of chats asks it."""

    def __init__(self, model, folder: Path | None, tokenizer, layout: PromptLayout):
        slots = Slots(model, 2, 4, next(model.parameters()).dtype)
        tiers, self.folder = AdapterTiers(slots, 4, lambda folder: None), folder
        self.engine = Engine(Decoder(model.requires_grad_(False), slots), tiers, tokenizer, 8, 64)
        base = PromptLayout(stop_token_ids=[2]).with_stops(sorted(declared_end_ids(model)))
        self.serving = Serving(self.engine, tiers, tokenizer, "base", base, None, ServerConfig())
        self.layout = layout
        self.serving.layouts[folder] = None, layout

    def prompt(self, messages) -> list[int]:
        return self.serving.chat_prompt(self.folder, [Turn(role=m.role, content=m.content) for m in messages], [])

    def answers(self, prompts, samplings) -> list[str]:
        ends = frozenset({*self.serving.base_layout.stop_token_ids, *self.layout.stop_token_ids})
        pieces: list[list[Piece]] = [[] for _ in prompts]
        for prompt, sampling, taken in zip(prompts, samplings, pieces, strict=True):
            self.engine.submit(GenerationRequest(prompt, sampling, ends, taken.append, self.folder))
        while self.engine.waiting or self.engine.running:
            self.engine.turn()
        assert not [piece.error for taken in pieces for piece in taken if piece.error is not None]
        return ["".join(piece.text for piece in taken) for taken in pieces]


def asked(layout: PromptLayout) -> list[Conversation]:
    return [layout.going_on(turns) for turns in TURNS]


def letters_tokenizer():
    """Return the tiny tokenizer with a letter for each token, so that an answer tells its tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    return tokenizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_four_commands_give_one_answer(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if dtype is torch.bfloat16 and family == "xlstm":
        pytest.skip("its forward pass mixes dtypes")
    model, tokenizer = adapted(family, tmp_path / "adapter", dtype), letters_tokenizer()
    prompts = prompts_of(asked(LAYOUT), LAYOUT, tokenizer)
    sampling = SamplingConfig(max_new_tokens=TOKENS)
    task = Task("any", score_nothing, None, TOKENS)
    rows = [Conversation([*messages, Message("assistant", "x")]) for messages in asked(LAYOUT)]
    samples = ValidationAnswers(rows, tokenizer, tmp_path, LAYOUT)
    served = Served(model_of(family, dtype), tmp_path / "adapter", tokenizer, LAYOUT)
    assert samples.prompts == prompts == [served.prompt(turns) for turns in TURNS]

    expected = generate_batch(model, tokenizer, prompts, sampling)
    ways = {
        "stream": ["".join(generate_stream(model, tokenizer, prompt, sampling)) for prompt in prompts],
        "evaluate": answer_rows(model, tokenizer, asked(LAYOUT), task, 3, LAYOUT),
        "samples": [text[: len(own)] for text, own in zip(samples.answers(model), expected, strict=True)],
        "serve": served.answers(prompts, [sampling] * len(TURNS)),
    }
    for name, found in ways.items():
        for prompt, text, own in zip(prompts, found, expected, strict=True):
            assert text == own or (dtype is torch.bfloat16 and part_at_a_tie(model, tokenizer, prompt, text, own)), name
    assert any(expected) and (len(set(expected)) > 1 or dtype is torch.bfloat16)


def part_at_a_tie(model, tokenizer, prompt: list[int], text: str, other: str) -> bool:
    """Return whether two answers part where the model in fp32 has two scores no farther apart than both are off."""
    ids, theirs = (tokenizer.convert_tokens_to_ids(list(each)) for each in (text, other))
    place = next(i for i, (own, its) in enumerate(zip([*ids, 2], [*theirs, 2], strict=False)) if own != its)
    first, second = ([*each, 2][place] for each in (ids, theirs))
    asked = torch.tensor([[*prompt, *ids[:place]]])
    with torch.no_grad():
        exact, rounded = (each(input_ids=asked, use_cache=False).logits[0].float() for each in (fp32(model), model))
    return bool((exact[-1, first] - exact[-1, second]).abs() <= 2 * (exact - rounded).abs().max())


def fp32(model):
    return copy.deepcopy(model).float()


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
LAYOUTS = {
    "system": LAYOUT,
    "own_template": replace(LAYOUT, system_prompt=None, template=CHAT_TEMPLATE.replace("assistant", "model")),
    "options": replace(LAYOUT, template="{{ style }}" + CHAT_TEMPLATE, template_options={"style": "short"}),
    "tools": replace(LAYOUT, template="{% if tools %}{{ tools | tojson }}{% endif %}" + CHAT_TEMPLATE, tools=[TOOL]),
    "raw": PromptLayout("raw", stop_token_ids=[2]),
    "text": PromptLayout("text", stop_token_ids=[2]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_four_commands_write_one_prompt(name: str, tmp_path: Path) -> None:
    layout, tokenizer = LAYOUTS[name], tiny_tokenizer()
    turns = [Message("user", "How many singers?")]
    typed = layout.prompt(layout.conversation(turns[0].content), tokenizer)
    of_rows = prompts_of([Prompt({}, Conversation(turns)).conversation(layout)], layout, tokenizer)
    row = Conversation([*layout.conversation(turns[0].content), Message("assistant", "x")], layout.tools)
    served = Served(model_of("llama"), tmp_path, tiny_tokenizer(), layout)
    assert [typed] == of_rows == [served.prompt(turns)]
    if layout.kind != "text":  # a row of text asks nothing
        assert ValidationAnswers([row], tokenizer, tmp_path, layout).prompts == of_rows
    said = tokenizer.decode(typed)
    assert "How many singers?" in said and ("tools" not in name or '"f"' in said)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mamba"])
def test_draws_of_an_answer_are_those_of_its_seed_alone(family: str, tmp_path: Path) -> None:
    """In a batch, in any order, streamed and served: the answer to prompt i is drawn by seed + i."""
    model, tokenizer = adapted(family, tmp_path / "adapter"), tiny_tokenizer()
    prompts = prompts_of(asked(LAYOUT), LAYOUT, tokenizer)
    sampling = SamplingConfig(max_new_tokens=TOKENS, temperature=0.7, top_p=0.9, seed=5)
    samplings = [replace(sampling, seed=5 + number) for number in range(len(prompts))]
    together = generate_batch(model, tokenizer, prompts, sampling)
    streamed = [
        "".join(generate_stream(model, tokenizer, prompt, own)) for prompt, own in zip(prompts, samplings, strict=True)
    ]
    served = Served(model_of(family), tmp_path / "adapter", tokenizer, LAYOUT)
    assert together == streamed == served.answers(prompts, samplings)
    assert together == [
        generate_batch(model, tokenizer, [p], own)[0] for p, own in zip(prompts, samplings, strict=True)
    ]
    again = generate_batch(model, tokenizer, [prompts[0]] * 2, sampling)
    assert again[0] == together[0] != again[1]
    assert generate_batch(model, tokenizer, prompts, SamplingConfig(max_new_tokens=TOKENS)) != together


def test_the_last_seed_draws_several_answers(tmp_path: Path) -> None:
    sampling = SamplingConfig(max_new_tokens=2, temperature=1.0, seed=2**63 - 1)
    assert len(generate_batch(adapted("llama"), tiny_tokenizer(), [[5, 6], [5, 6]], sampling)) == 2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_end_that_the_tokenizer_does_not_know_as_special_is_no_text(family: str, tmp_path: Path) -> None:
    """A token of `model.new_tokens` may end the turns of a template; padding, too, may be a token with text."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<end>", special=False)])
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_end|>", "<end>")
    tokenizer.pad_token = None
    end = tokenizer.convert_tokens_to_ids("<end>")
    layout = PromptLayout(template=tokenizer.chat_template, stop_token_ids=[2, end])
    texts = ["yes", "no, cat"]
    model, words = model_of(family, tie_word_embeddings=False), tokenizer(texts, add_special_tokens=False)["input_ids"]
    prompts = [[5, 6, 7], [5, 6, 9, 10, 11]]
    say(model, prompts, [[*ids, end] for ids in words])
    sampling = SamplingConfig(max_new_tokens=40)
    assert generate_batch(model, tokenizer, prompts, sampling) == texts
    assert ["".join(generate_stream(model, tokenizer, prompt, sampling)) for prompt in prompts] == texts
    assert Served(model, None, tokenizer, layout).answers(prompts, [sampling] * 2) == texts


@torch.no_grad()
def say(model, prompts: list[list[int]], answers: list[list[int]]) -> None:
    """Have a model give these answers: its blocks add nothing, and its head takes the last token to the next one."""
    follows = {}
    for prompt, answer in zip(prompts, answers, strict=True):
        follows |= zip([prompt[-1], *answer], answer, strict=False)
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter is not embeddings:
            parameter.zero_()
    for before, token in follows.items():
        head[token] += embeddings[before] - embeddings[before].mean()


def test_a_stop_of_the_layout_ends_every_answer(tmp_path: Path) -> None:
    """`stop_token_ids` of prompt_layout.json are what exports and `serve` go by."""
    model, tokenizer = adapted("llama", tmp_path / "adapter"), letters_tokenizer()
    prompts, sampling = prompts_of(asked(LAYOUT), LAYOUT, tokenizer), SamplingConfig(max_new_tokens=TOKENS)
    whole = generate_batch(model, tokenizer, prompts, sampling)
    stop = tokenizer.convert_tokens_to_ids(whole[0][1])
    layout = replace(LAYOUT, stop_token_ids=[2, stop])
    cut = [text.partition(whole[0][1])[0] for text in whole]
    assert cut != whole
    assert answer_rows(model, tokenizer, asked(layout), Task("any", score_nothing, None, TOKENS), 3, layout) == cut
    assert "".join(generate_stream(model, tokenizer, prompts[0], sampling, layout.stop_token_ids)) == cut[0]
    served = Served(model_of("llama"), tmp_path / "adapter", tokenizer, layout)
    assert served.answers(prompts, [sampling] * len(prompts)) == cut


@pytest.mark.parametrize("family", ["rwkv", "xlstm"])
def test_a_family_without_transformers_cache_is_computed_anew_by_the_engine(family: str, caplog) -> None:
    model = model_of(family)
    with caplog.at_level("INFO"):
        decoder = Decoder(model)
    assert isinstance(decoder.steps, AnewSteps) and decoder.can_batch
    assert "each token is computed from all before it" in caplog.text and why_not_decoded(model) is not None


def test_answers_beyond_the_context_are_said(caplog) -> None:
    model, tokenizer = small_model("llama", vocab_size=320, max_position_embeddings=32), tiny_tokenizer()
    generate_batch(model, tokenizer, [[5] * 20], SamplingConfig(max_new_tokens=12))
    assert "context" not in caplog.text
    generate_batch(model, tokenizer, [[5] * 20, [5] * 23], SamplingConfig(max_new_tokens=10))
    assert "1 of 2 answers end beyond the model's context of 32 tokens" in caplog.text
    assert "the longest of their prompts has 23" in caplog.text
    "".join(generate_stream(model, tokenizer, [5] * 24, SamplingConfig(max_new_tokens=10)))
    assert "1 of 1 answers end beyond" in caplog.text


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_are_not_finite_give_no_answer(family: str, temperature: float, caplog) -> None:
    model, tokenizer = model_of(family, tie_word_embeddings=False), tiny_tokenizer()
    with torch.no_grad():
        model.get_input_embeddings().weight[40] = torch.nan
    sampling = SamplingConfig(max_new_tokens=5, temperature=temperature)
    first, second = generate_batch(model, tokenizer, [[5, 6, 7], [5, 40, 7, 8]], sampling)
    assert second == "" and first == generate_batch(model, tokenizer, [[5, 6, 7]], sampling)[0]
    assert "1 of 2 answers are empty, the first of them that to prompt 2: the scores of the next token" in caplog.text
    with pytest.raises(ValueError, match="the scores of the next token are not finite, so there is no answer"):
        list(generate_stream(model, tokenizer, [5, 40, 7], sampling))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_stream_is_over_when_its_thread_is(family: str) -> None:
    """A thread that is left behind would give the model back its settings in the middle of the next answer."""
    model, tokenizer = model_of(family), letters_tokenizer()
    whole = generate_batch(model, tokenizer, [[5, 6, 7]], SamplingConfig(max_new_tokens=TOKENS))[0]
    stop = tokenizer.convert_tokens_to_ids(whole[2])
    own, before = model.generation_config, threading.active_count()
    for _ in range(5):
        text = "".join(generate_stream(model, tokenizer, [5, 6, 7], SamplingConfig(max_new_tokens=TOKENS), [stop]))
        assert text == whole.partition(whole[2])[0]
        assert model.generation_config is own and threading.active_count() == before


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_stream_that_nobody_takes_on_ends(family: str) -> None:
    model, tokenizer = model_of(family), letters_tokenizer()
    own, before = model.generation_config, threading.active_count()
    stream = generate_stream(model, tokenizer, [5, 6, 7], SamplingConfig(max_new_tokens=TOKENS))
    next(stream)
    stream.close()
    assert model.generation_config is own and threading.active_count() == before


def test_room_is_made_for_no_more_than_the_context(monkeypatch) -> None:
    """Who asks for a million tokens means no bound; that many positions a row would leave room for one row."""
    asked = []
    reserve = StaticSteps.reserve
    monkeypatch.setattr(StaticSteps, "reserve", lambda self, *size: asked.append(size) or reserve(self, *size))
    model, tokenizer = model_of("llama"), tiny_tokenizer()
    follows = [[5, 6, 7], [5, 6, 9, 10, 11]]
    say(model, follows, [[20, 2], [21, 2]])
    answers = generate_batch(model, tokenizer, follows, SamplingConfig(max_new_tokens=10**6))
    assert answers == [tokenizer.decode([20]), tokenizer.decode([21])]
    assert asked == [(2, SIZES["max_position_embeddings"])]
