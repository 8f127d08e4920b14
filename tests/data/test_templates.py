"""Every template against what it renders itself: prompts token for token, and the text that follows each."""

import random
import time
from dataclasses import asdict, replace

import pytest
from chat_templates import OURS, STORED, TRL, tokenizer_of

from lightning_peft.data.audit import Audit
from lightning_peft.data.chat import Encoder, encode_all, encode_prompt, end_token_ids
from lightning_peft.data.config import DataConfig, OnBadRow, Reasoning
from lightning_peft.data.conversation import Conversation, Message, Row
from lightning_peft.data.rendering import Rules, TokenKind
from lightning_peft.data.row_reader import row_reader
from lightning_peft.data.samples import encode_rows
from lightning_peft.data.template import ChatTemplateError
from lightning_peft.data.tokenizer_template import template_of

CALL = {"id": "abc123xyz", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "City"}},
                "required": ["city"],
            },
        },
    }
]
ASKED, ANSWERED = Message("user", "What is 2+2?"), Message("assistant", "It is 4.")
THOUGHT = Message("assistant", "It is 4.", reasoning="Two and two make four.")
MORE = [Message("user", "And 3+3?"), Message("assistant", "6.")]
CALLS = Conversation(
    [
        Message("user", "Weather in Oslo?"),
        Message("assistant", "", tool_calls=(CALL,)),
        Message("tool", "3 C", name="weather", tool_call_id="abc123xyz"),
        Message("assistant", "It is 3 C."),
    ],
    TOOLS,
)
CONVERSATIONS = {
    "single turn": Conversation([ASKED, ANSWERED]),
    "two turns": Conversation([ASKED, ANSWERED, *MORE]),
    "three turns": Conversation([ASKED, ANSWERED, *MORE, Message("user", "Thanks"), Message("assistant", "Bye.")]),
    "system": Conversation([Message("system", "Be terse."), ASKED, ANSWERED, *MORE]),
    "thought": Conversation([ASKED, THOUGHT]),
    "thoughts": Conversation([ASKED, THOUGHT, MORE[0], Message("assistant", "6.", reasoning="Three and three.")]),
    "calls": CALLS,
    "thoughts and calls": Conversation(
        [
            CALLS[0],
            Message("assistant", "", reasoning="I need to look.", tool_calls=(CALL,)),
            CALLS[2],
            Message("assistant", "It is 3 C.", reasoning="Cold."),
            Message("user", "Thanks"),
            Message("assistant", "Welcome.", reasoning="Polite."),
        ],
        TOOLS,
    ),
}
NAMES = [*OURS, *STORED]
NO_SYSTEM = {"gemma"}
NO_TOOLS = {
    "chatml", "smollm2", "mistral_v0.1", "olmo", "phi4", "phi4_mini", "opens_thought",
    "llama3", "gemma", "gemma3", "phi3", "phi3_5", "cohere", "cohere2", "deepseekv3", "deepseek_r1_distill",
}  # fmt: skip
"""Templates that write no tools; Phi 4 mini does from a key of the system turn, not from its variable."""
NO_THOUGHT = {
    (name, kind)
    for name in ("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4")
    for kind in ("thought", "thoughts", "thoughts and calls")
}
NO_THOUGHT |= {
    (name, "thoughts and calls") for name in ("llama3_1", "llama3_2", "mistral_v0.3")
}  # a turn is a call or text
OPENS = ("deepseekv3", "deepseek_r1_distill", "nemotron", "opens_thought")
"""Their prompts open a thought that their renderings of an answer do not begin with, or not always."""

MOVES = {("mistral_v0.3", "system"), ("gptoss", "thoughts and calls")}
"""Templates that write the text of the prompt elsewhere, or drop it, with the answer."""


def dicts(tokenizer, messages):
    """Return messages as `apply_chat_template` takes them, thoughts inline where the template has no key for them."""
    template = template_of(tokenizer)
    return [template.spelled(message) for message in messages]


def applied(tokenizer, conversation, messages, generation, **more):
    return tokenizer.apply_chat_template(
        dicts(tokenizer, messages),
        chat_template=template_of(tokenizer).source,  # they are the tokenizer's own, but for today's date
        tools=conversation.tools,
        xml_tools=conversation.tools,  # SmolLM 3's name for them
        tokenize=False,
        add_generation_prompt=generation,
        **more,
    )


def samples_by_turn(tokenizer, conversation):
    """Return the prompt's tokens and the trained text of each trained turn, in the order of the turns."""
    [samples] = encode_all([conversation], tokenizer)
    turns = []
    for sample in samples:
        trained = [label != -100 for label in sample.labels]
        starts = [i for i in range(1, len(trained)) if trained[i] and not trained[i - 1]]
        for start in starts:
            stop = next((i for i in range(start, len(trained)) if not trained[i]), len(trained))
            turns.append((sample.input_ids[:start], sample.input_ids[start:stop]))
    return sorted(turns, key=lambda turn: len(turn[0]))


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_each_turn_follows_its_prompt_as_the_template_renders_it(name, kind):
    tokenizer, conversation = tokenizer_of(name), CONVERSATIONS[kind]
    refused = (
        (kind == "system" and name in NO_SYSTEM)
        or (conversation.tools and name in NO_TOOLS)
        or (name, kind) in NO_THOUGHT
    )
    if refused:
        with pytest.raises(ChatTemplateError, match="refuses a conversation|does not write (the|tool calls)"):
            encode_all([conversation], tokenizer)
        return
    turns = samples_by_turn(tokenizer, conversation)
    answers = [index for index, message in enumerate(conversation) if message.role == "assistant"]
    assert len(turns) == len(answers)
    for (prompt_ids, trained_ids), index in zip(turns, answers, strict=True):
        before, message = conversation.before(index), conversation[index]
        thinks = {"enable_thinking": True} if name == "qwen3_5_nothink" and message.reasoning else {}
        prompt = applied(tokenizer, conversation, before, True, **thinks)
        whole = applied(tokenizer, conversation, conversation[: index + 1], False)
        assert tokenizer.decode(prompt_ids) == prompt
        assert prompt_ids == tokenizer(prompt, add_special_tokens=False)["input_ids"]
        trained = tokenizer.decode(trained_ids)
        if whole.startswith(prompt):
            follows = whole[len(prompt) :]
            if name == "glm4moe":  # the next turn's beginning ends this one
                follows += "<|observation|>" if message.tool_calls else "<|user|>"
            assert follows.startswith(trained)
            assert not follows.removeprefix(trained).strip("\n") or name.startswith("phi")  # EOS after the last message
        else:
            assert name.startswith(OPENS) or (name, kind) in MOVES
        for part in (message.reasoning or "", message.content, "weather" if message.tool_calls else ""):
            assert part in trained
        assert end_of(trained, tokenizer)


def end_of(text, tokenizer):
    return any(text.endswith(tokenizer.decode([token])) for token in end_token_ids(tokenizer))


@pytest.mark.parametrize("name", NAMES)
def test_prompt_of_generation_is_the_templates_own(name):
    tokenizer = tokenizer_of(name)
    for messages in ([ASKED], [ASKED, ANSWERED, MORE[0]]):
        applied_ids = tokenizer.apply_chat_template(
            [{"role": message.role, "content": message.content} for message in messages],
            chat_template=template_of(tokenizer).source,
            add_generation_prompt=True,
            return_dict=False,
        )
        assert encode_prompt(messages, tokenizer) == applied_ids


AGREE_WITH_TRL = (
    "llama3", "qwen2_5", "qwen3", "qwen3_instruct_2507", "gemma", "gemma3", "phi3_5", "cohere", "cohere2", "gptoss",
    "glm4moe", "lfm2_2_5",
)  # fmt: skip
"""The others write a thought into the prompt, which `trl`'s masks count as a part of the answer."""


@pytest.mark.parametrize("name", AGREE_WITH_TRL)
def test_trained_tokens_are_those_of_trls_training_template(name):
    tokenizer = tokenizer_of(name)
    path = TRL / f"{name}_training.jinja"
    masked = tokenizer.apply_chat_template(
        [{"role": "user", "content": ASKED.content}, {"role": "assistant", "content": ANSWERED.content}],
        chat_template=path.read_text() if path.exists() else None,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    marked = zip(masked["input_ids"], masked["assistant_masks"], strict=True)
    theirs = tokenizer.decode([token for token, kept in marked if kept])
    [(_, ours)] = samples_by_turn(tokenizer, CONVERSATIONS["single turn"])
    header = {"gptoss": "<|start|>assistant", "qwen2_5": "\n"}.get(name, "")  # the generation prompt holds it
    assert tokenizer.decode(ours) == theirs.removeprefix(header).rstrip("\n").removesuffix("\n<|endoftext|>")


STOPS = {
    "glm4moe": {"<|endoftext|>", "<|user|>", "<|observation|>"},
    "cohere2": {"<|END_OF_TURN_TOKEN|>"},
    "gptoss": {"<|return|>", "<|call|>"},
    "phi3_5": {"<|endoftext|>", "<|end|>"},
    "gemma4_v5": {"<turn|>", "<|tool_response>"},
    "deepseek_r1_distill": {"<｜end▁of▁sentence｜>"},
}


@pytest.mark.parametrize("name", STOPS)
def test_stop_tokens_are_those_that_end_an_answer_or_a_call(name):
    tokenizer = tokenizer_of(name)
    assert {tokenizer.decode([token]) for token in end_token_ids(tokenizer)} == STOPS[name]


def test_tools_reach_a_template_that_calls_them_otherwise():
    """SmolLM 3 names them xml_tools."""
    tokenizer = tokenizer_of("smollm3")
    [[sample]] = encode_all([Conversation([ASKED, ANSWERED], TOOLS)], tokenizer)
    assert "Weather of a city" in tokenizer.decode(sample.input_ids)


SAID = {"a": "it's\n", "b": [1, {"c": "é"}], "d": True, "e": 1.5}
SEVERAL = Conversation(
    [
        Message("user", "Weather in Oslo and Rome?"),
        Message("assistant", "I look.", tool_calls=(CALL, CALL)),
        Message("tool", "3 C", name="weather"),
        Message(
            "assistant",
            "",
            tool_calls=({"type": "function", "function": {"name": "say", "arguments": SAID}},),
        ),
        Message("tool", "ok", name="say"),
        Message("assistant", "Done."),
    ],
    TOOLS,
)  # fmt: skip


def test_mistrals_ids_of_calls_and_results_are_written():
    """Nine letters or digits, which the template demands of every call, also of one that is tried."""
    tokenizer = tokenizer_of("mistral_v0.3")
    [[sample]] = encode_all([CALLS], tokenizer)
    assert text_of_kind(sample, TokenKind.tool_call, tokenizer) == (
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}, "id": "abc123xyz"}]'
    )
    assert '[TOOL_RESULTS] {"content": 3 C, "call_id": "abc123xyz"}' in tokenizer.decode(sample.input_ids)
    assert template_of(tokenizer).writes("tool", "tool_call_id")
    nameless = {**CALL, "id": "call_1"}
    with pytest.raises(ChatTemplateError, match="nine letters or digits as id"):
        encode_all([Conversation([ASKED, Message("assistant", "", tool_calls=(nameless,))], TOOLS)], tokenizer)


CALLED = {"lfm2": ("lfm2_v2", "<|tool_call_start|>"), "smollm3": ("qwen3", "<tool_call>")}
"""Templates that leave calls to the text, each with one that writes them the same way from their key."""


@pytest.mark.parametrize("name", CALLED)
def test_calls_are_the_text_of_a_turn_where_the_template_has_no_place_for_them(name):
    other, opening = CALLED[name]
    tokenizer, oracle = tokenizer_of(name), tokenizer_of(other)
    [samples] = encode_all([SEVERAL], tokenizer)
    ours = [tokenizer.decode(trained) for _, trained in samples_by_turn(tokenizer, SEVERAL)]
    for said, index in zip(ours, (1, 3, 5), strict=True):
        message = SEVERAL[index]
        turn = {"role": "assistant", "content": message.content, "tool_calls": list(message.tool_calls)}
        asked = [{"role": "user", "content": "Q"}]
        prompt, whole = (
            oracle.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation)
            for turns, generation in ((asked, True), ([*asked, turn], False))
        )
        assert said == whole.removeprefix(prompt).removeprefix("<think>\n\n</think>\n\n").rstrip("\n")
        assert (opening in said) == bool(message.tool_calls)
    kinds = b"".join(sample.kinds for sample in samples)
    assert {TokenKind.answer, TokenKind.tool_call, TokenKind.end} == set(kinds) - {0}


@pytest.mark.parametrize(
    ("options", "system"), [({"enable_thinking": False}, "Be terse."), ({}, "Be terse. /no_think")]
)
def test_switch_of_thinking_is_in_prompt_and_training_alike(options, system):
    tokenizer = tokenizer_of("smollm3")
    encoder = Encoder(tokenizer, template_options=options)
    conversation = Conversation([Message("system", system), ASKED, ANSWERED])
    [[sample]] = encoder.encode([conversation])
    prompt = encoder.prompt(conversation.before(2))
    assert sample.input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(prompt).endswith("assistant\n<think>\n\n</think>\n")
    assert tokenizer.decode([label for label in sample.labels if label != -100]) == "It is 4.<|im_end|>"


NAMED = "{% for m in messages %}{{ '<|im_start|>' + m.role + (' ' + m.name if m.name else '') + '\n' + m.content }}"
NAMED += "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def test_template_says_which_keys_of_turns_it_writes():
    tokenizer = tokenizer_of("chatml")
    assert not any(template_of(tokenizer).writes(role, "name") for role in ("system", "user", "assistant", "tool"))
    tokenizer.chat_template = NAMED
    assert all(template_of(tokenizer).writes(role, "name") for role in ("system", "user", "assistant", "tool"))


def test_parts_of_a_turn_are_told_apart():
    tokenizer = tokenizer_of("qwen3")
    [[sample, _]] = encode_all([CONVERSATIONS["thoughts and calls"]], tokenizer)
    text = {
        kind: tokenizer.decode([t for t, k in zip(sample.input_ids, sample.kinds, strict=True) if k == kind])
        for kind in TokenKind
        if kind
    }
    assert text[TokenKind.reasoning] == "<think>\nI need to look.\n</think>\n\n<think>\nCold.\n</think>\n\n"
    assert text[TokenKind.answer] == "It is 3 C."
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>' in text[TokenKind.tool_call]
    assert text[TokenKind.end] == "<|im_end|><|im_end|>"


SPELLINGS = ["<think>Two.</think>It is 4.", "<think>\nTwo.\n</think>\n\nIt is 4.", "<think> Two.\n</think>\nIt is 4."]


@pytest.mark.parametrize("content", SPELLINGS)
@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "qwen3_6", "glm4moe", "nemotron_3_nano", "gptoss"])
def test_thought_written_into_the_answer_is_spelled_as_the_template_does(name, content):
    tokenizer = tokenizer_of(name)
    inline = Conversation([ASKED, Message("assistant", content)])
    by_key = Conversation([ASKED, Message("assistant", "It is 4.", reasoning="Two.")])
    assert encode_all([inline], tokenizer) == encode_all([by_key], tokenizer)


NO_THOUGHTS = [
    "The tag </think> closes a thought.",
    "Close with [/THINK] please.",
    "<think> opens one, never closed.",
    "```html\n\n</think>\n\n```",
    "think",
    "i",
]


@pytest.mark.parametrize("rule", ["keep", "drop"])
@pytest.mark.parametrize("content", NO_THOUGHTS)
@pytest.mark.parametrize("name", ["chatml", "qwen2_5", "llama3_1", "qwen3", "gptoss", "glm4moe", "gemma4_v5"])
def test_answer_that_speaks_of_thoughts_is_an_answer(name, content, rule):
    tokenizer = tokenizer_of(name)
    turns = Conversation([ASKED, Message("assistant", content)])
    [[sample]] = encode_all([turns], tokenizer, Rules(reasoning=Reasoning(rule)))
    assert text_of_kind(sample, TokenKind.answer, tokenizer).removeprefix("<|channel|>final<|message|>") == content
    assert "".join(text_of_kind(sample, TokenKind.reasoning, tokenizer).split()) in ("", "<think></think>")


INSIDE = "Sure. <think>two</think> It is 4."


@pytest.mark.parametrize(("rule", "trained"), [("keep", INSIDE), ("drop", "Sure. It is 4.")])
@pytest.mark.parametrize("name", ["chatml", "qwen2_5", "llama3_1", "qwen3", "gptoss", "glm4moe", "gemma4_v5"])
def test_thought_in_the_middle_of_an_answer_is_text_unless_thoughts_are_dropped(name, rule, trained):
    tokenizer = tokenizer_of(name)
    turns = Conversation([ASKED, Message("assistant", INSIDE)])
    [[sample]] = encode_all([turns], tokenizer, Rules(reasoning=Reasoning(rule)))
    assert text_of_kind(sample, TokenKind.answer, tokenizer).removeprefix("<|channel|>final<|message|>") == trained


def text_of_kind(sample, kind, tokenizer):
    return tokenizer.decode([token for token, k in zip(sample.input_ids, sample.kinds, strict=True) if k == kind])


OPENED_BEFORE = {"deepseek_r1_distill": "Two. </think> It is 4.", "qwen3_6": "Two.</think>It is 4."}
OPENED_BEFORE |= {"chatml": "Two.\n</think>\n\nIt is 4.", "qwen3": "Two.\n</think>\n\nIt is 4."}


@pytest.mark.parametrize("name", OPENED_BEFORE)
def test_thought_whose_opening_the_prompt_wrote_is_a_thought(name):
    """A closing mark is one anywhere where the template's prompt opens the thought, else as DeepSeek-R1 writes it."""
    tokenizer = tokenizer_of(name)
    inline = Conversation([ASKED, Message("assistant", OPENED_BEFORE[name])])
    [[kept]], [[dropped]] = (
        encode_all([inline], tokenizer, Rules(reasoning=rule)) for rule in (Reasoning.keep, Reasoning.drop)
    )
    assert "Two." in text_of_kind(kept, TokenKind.reasoning, tokenizer)
    assert [text_of_kind(sample, TokenKind.answer, tokenizer) for sample in (kept, dropped)] == ["It is 4."] * 2
    assert "Two." not in tokenizer.decode(dropped.input_ids)


NOTHING = "<think>\n\n</think>\n\n"
CALLED_AS = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
SHORT = {
    "answer i": (Message("assistant", "i"), [NOTHING, "i", ""]),
    "thought t": (Message("assistant", "", reasoning="t"), ["<think>\nt\n</think>\n\n", "", ""]),
    "thought think": (Message("assistant", "think", reasoning="think"), ["<think>\nthink\n</think>\n\n", "think", ""]),
    "call beside i": (
        Message("assistant", "i", tool_calls=(CALL,)),
        [NOTHING, "i", f"\n{CALLED_AS}"],
    ),
    "call": (
        Message("assistant", "", tool_calls=(CALL,)),
        [NOTHING, "", CALLED_AS],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHORT)
def test_parts_that_stand_in_the_marks_around_them_are_told_apart(name):
    """ "i" and "t" stand in "<think>" too."""
    tokenizer = tokenizer_of("qwen3")
    message, expected = SHORT[name]
    [[sample]] = encode_all([Conversation([ASKED, message], TOOLS)], tokenizer)
    kinds = (TokenKind.reasoning, TokenKind.answer, TokenKind.tool_call)
    assert [text_of_kind(sample, kind, tokenizer) for kind in kinds] == expected
    assert text_of_kind(sample, TokenKind.end, tokenizer) == "<|im_end|>"


PLAIN_TURNS = [Message("assistant", "  two  spaces"), Message("assistant", "", tool_calls=(CALL,)), ANSWERED]


@pytest.mark.parametrize("message", PLAIN_TURNS, ids=["spaces", "call", "answer"])
@pytest.mark.parametrize("name", ["nemotron_3_nano", "nemotron_3_ultra", "qwen3_6"])
def test_turn_after_an_opened_thought_is_written_as_one_with_a_thought(name, message):
    """The prompt opens a thought; what follows an empty one is what the template has behind another."""
    tokenizer = tokenizer_of(name)
    plain, thinking = (Conversation([ASKED, one], TOOLS) for one in (message, replace(message, reasoning="Qzw")))
    said = applied(tokenizer, thinking, thinking, False).rpartition("<think>\nQzw")[2].rstrip("\n")
    [(_, trained_ids)] = samples_by_turn(tokenizer, plain)
    assert tokenizer.decode(trained_ids) == said


def test_thought_alone_leaves_nothing_where_thoughts_are_dropped():
    for message in (Message("assistant", "<think>t</think>"), Message("assistant", "", reasoning="t")):
        with pytest.raises(ChatTemplateError, match="data.reasoning=drop: assistant message 2 is a thought alone"):
            encode_all([[ASKED, message]], tokenizer_of("chatml"), Rules(reasoning=Reasoning.drop))
    with pytest.raises(ChatTemplateError, match="assistant message 2 says nothing, its thought is empty"):
        encode_all([[ASKED, Message("assistant", "<think></think>")]], tokenizer_of("qwen3"))


@pytest.mark.parametrize("name", ["gemma4_v5", "qwen3_6", "qwen3", "llama3_1", "nemotron_3_nano", "gptoss", "glm4moe"])
@pytest.mark.parametrize("kind", ["exchanges", "one long exchange"])
def test_long_conversation_is_as_its_beginnings_are(name, kind):
    """Beyond a few turns prompts are put together from parts; the whole rendering is the oracle."""
    tokenizer = tokenizer_of(name)
    turns = [message for number in range(14) for message in (Message("user", f"Q{number}"), answer(name, number))]
    if kind != "exchanges":
        turns = [Message("user", "Do it")]
        for number in range(14):
            turns += [Message("assistant", "", tool_calls=(numbered_call(number),)), Message("tool", f"R{number}")]
        turns.append(Message("assistant", "Done."))
    conversation = Conversation([Message("system", "Be terse."), *turns], TOOLS)
    by_turn = samples_by_turn(tokenizer, conversation)
    answers = [index for index, message in enumerate(conversation) if message.role == "assistant"]
    assert len(by_turn) == len(answers)
    for (prompt_ids, _), index in zip(by_turn, answers, strict=True):
        assert tokenizer.decode(prompt_ids) == applied(tokenizer, conversation, conversation.before(index), True)


def answer(name, number):
    return Message("assistant", f"A{number}", reasoning=None if name == "llama3_1" else f"T{number}")


def numbered_call(number):
    return {"type": "function", "function": {"name": "weather", "arguments": {"city": f"C{number}"}}}


def is_refused(name, conversation):
    """Return whether the template cannot write a random conversation, by what was found of it above."""
    system, calls = conversation[0].role == "system", any(message.tool_calls for message in conversation)
    return bool(
        (system and name in NO_SYSTEM)
        or (conversation.tools and name in NO_TOOLS)
        or ((name, "thought") in NO_THOUGHT and any(message.reasoning for message in conversation))
        or (name == "mistral_v0.3" and system and calls)  # written before a user's turn alone, if it is the last
    )


AFTER_THOUGHT = ("deepseekv3", "deepseek_r1_distill", "opens_thought")
"""Templates whose prompts open a thought that their renderings drop, or write no mark of where it is empty."""
HEADERS = {"mistral_v0.3": "[/INST]", "gptoss": "<|start|>assistant"}
"""Text before an answer where the prompt before it is written otherwise once it is there."""


def to_be_trained(name, tokenizer, prompt, whole, message, with_thought):
    """Return the text that generation is to write: what the template's rendering of the turn has behind its prompt."""
    if whole.startswith(prompt):
        said = whole[len(prompt) :].rstrip("\n")
        if name in ("phi3", "phi3_5"):
            said = said.removesuffix("\n<|endoftext|>")
        if name == "glm4moe":
            said += "<|observation|>" if message.tool_calls else "<|user|>"
        return said
    if name in AFTER_THOUGHT:
        return (message.reasoning or "").strip() + "\n</think>\n\n" + message.content + tokenizer.eos_token
    if name.startswith("nemotron"):  # its empty thought is none that follows the prompt: as with another, without that
        assert not message.reasoning
        return with_thought("Qzw").rpartition("<think>\nQzw")[2].rstrip("\n")
    return whole.split(HEADERS[name])[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_random_conversations_train_exactly_what_was_said(name):
    """Rows of them are read, or are bad rows where the template cannot write them; no other exception."""
    tokenizer, rng = tokenizer_of(name), random.Random(name)
    conversations = [random_conversation(rng) for _ in range(200)]
    config, audit = DataConfig(max_length=100_000, on_bad_row=OnBadRow.skip), Audit()
    rows = [Row(row_of(conversation), f"row {number}") for number, conversation in enumerate(conversations)]
    read = [row_reader(row.values, config)(row) for row in rows]
    refused = [is_refused(name, conversation) for conversation in conversations]
    trained = list(encode_rows(rows, config, tokenizer, audit))
    assert (audit.rows, audit.bad_rows) == (200, sum(refused)), audit.bad_row_messages
    expected = []
    for conversation, is_bad in zip(read, refused, strict=True):
        if is_bad:
            continue
        turns = samples_by_turn(tokenizer, conversation)
        answers = [index for index, message in enumerate(conversation) if message.role == "assistant"]
        assert len(turns) == len(answers)
        for (prompt_ids, trained_ids), index in zip(turns, answers, strict=True):
            message = conversation[index]
            thinks = {"enable_thinking": True} if name == "qwen3_5_nothink" and message.reasoning else {}
            prompt = applied(tokenizer, conversation, conversation.before(index), True, **thinks)
            before = conversation[:index]
            whole = applied(tokenizer, conversation, [*before, message], False)

            def with_thought(thought, before=before, message=message, conversation=conversation):
                return applied(tokenizer, conversation, [*before, replace(message, reasoning=thought)], False)

            assert tokenizer.decode(prompt_ids) == prompt
            assert tokenizer.decode(trained_ids) == to_be_trained(name, tokenizer, prompt, whole, message, with_thought)
            expected += trained_ids
    assert len(expected) > 1000
    assert sorted(label for sample in trained for label in sample.labels if label != -100) == sorted(expected)


PIECES = ["Hi", "é", "😀", " two  spaces ", "1.5\n\nnew", "<b>x</b>", "{{ x }}", "</s>", "a|b", "\tTab", "end.", "日本"]


def random_text(rng):
    return " ".join(rng.choices(PIECES, k=rng.randrange(1, 5))) + "."


def random_conversation(rng):
    messages = [Message("system", random_text(rng))] if rng.random() < 0.3 else []
    tools = TOOLS if rng.random() < 0.3 else None
    for number in range(rng.randrange(1, 5)):
        messages.append(Message("user", random_text(rng)))
        if tools and rng.random() < 0.6:
            function = {"name": "weather", "arguments": {"city": random_text(rng)}}
            call = {"id": f"call{number:05}", "type": "function", "function": function}
            messages += [
                Message("assistant", "", tool_calls=(call,)),
                Message("tool", random_text(rng), name="weather", tool_call_id=call["id"]),
            ]
        thought = random_text(rng) if rng.random() < 0.3 else None
        messages.append(Message("assistant", random_text(rng), reasoning=thought))
    return Conversation(messages, tools)


def row_of(conversation):
    """Return a row as a data set holds it."""
    keys = {"reasoning": "reasoning_content"}
    turns = [
        {
            keys.get(key, key): value
            for key, value in asdict(message).items()
            if value not in (None, ()) or key == "content"
        }
        for message in conversation
    ]
    for turn in turns:
        turn.pop("weight")
        if "tool_calls" in turn:
            turn["tool_calls"] = list(turn["tool_calls"])
    return {"messages": turns} | ({} if conversation.tools is None else {"tools": conversation.tools})


@pytest.mark.parametrize("name", NAMES)
def test_cost_is_linear_in_the_turns(name):
    """200 turns on any template in a second of processor time, the least of three; Gemma 4's once took 32."""
    tokenizer = tokenizer_of(name)
    turns = [
        message for number in range(100) for message in (Message("user", f"Q{number}"), answer("llama3_1", number))
    ]
    encode_all([Conversation(turns[:4])], tokenizer)  # some things are found out about a template once
    seconds = []
    for _ in range(3):  # a core that others use, or a collection of garbage, adds to one of them
        started = time.process_time()
        encode_all([Conversation(turns)], tokenizer)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 1
