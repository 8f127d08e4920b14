"""Ollama's Modelfile: its template writes what the chat template writes."""

import re
from typing import Any

import pytest

from lightning_peft.data.conversation import Message
from lightning_peft.data.layout import PromptLayout
from lightning_peft.models.loading import load_tokenizer
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.tiny import CHAT_TEMPLATE, tiny_tokenizer
from lightning_peft.serving.ollama import PROBES, modelfile, turns_of
from lightning_peft.serving.prompt import template_as_trained

LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ADDS_UP = "{% for m in messages %}{{ loop.index }}:{{ m['content'] }}{% endfor %}"


def go(template: str, messages: list[dict[str, str]]) -> str:
    """Run the template as Ollama does, for the words of Go's language that a Modelfile of ours uses."""
    default, turns, answer = re.fullmatch(
        r"(.*?)\{\{ range .Messages \}\}(.*)\{\{ end \}\}(.*)", template, re.S
    ).groups()
    if default:
        text = re.fullmatch(r"\{\{ if not .System \}\}(.*)\{\{ end \}\}", default, re.S)[1]
        default = "" if any(m["role"] == "system" for m in messages) else text
    roles = dict(re.findall(r'\{\{ (?:else )?if eq .Role "(\w+)" \}\}(.*?)(?=\{\{ else if|\{\{ end)', turns, re.S))
    return default + "".join(roles[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages) + answer


@pytest.mark.parametrize("roles", PROBES, ids=len)
@pytest.mark.parametrize("kind", ["tiny", "smollm2", "llama_3"])
def test_template_writes_what_the_chat_template_writes(kind: str, roles: list[str]) -> None:
    tokenizer = load_tokenizer(ModelConfig("smollm2_135m")) if kind == "smollm2" else tiny_tokenizer()
    if kind == "llama_3":
        tokenizer.chat_template = LLAMA_3
        tokenizer.bos_token = "<|endoftext|>"
    messages = [{"role": role, "content": f"{number}, or so?"} for number, role in enumerate(roles)]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert go(turns_of(PromptLayout(), tokenizer).go_template(), messages) == expected


def test_modelfile_brings_the_trained_prompt_and_stops() -> None:
    layout = PromptLayout(system_prompt="Translate to SQL.", template=CHAT_TEMPLATE, stop_token_ids=[0, 2])
    lines = modelfile("./base.gguf", "./adapter.gguf", layout, tiny_tokenizer())
    assert lines.startswith("FROM ./base.gguf\nADAPTER ./adapter.gguf\nTEMPLATE ")
    assert lines.endswith(
        'SYSTEM """Translate to SQL."""\nPARAMETER stop """<|endoftext|>"""\nPARAMETER stop """<|im_end|>"""\n'
    )


def test_text_without_turns_is_its_own_template() -> None:
    lines = modelfile("base", None, PromptLayout(kind="raw", stop_token_ids=[2]), tiny_tokenizer())
    assert lines == 'FROM base\nTEMPLATE """{{ .Prompt }}"""\nPARAMETER stop """<|im_end|>"""\n'


@pytest.mark.parametrize("stop", ["\n", '"', "\\"])
def test_a_stop_token_stands_there_as_text(stop: str) -> None:
    """A token's own name is another text, and Ollama's parser knows no escapes."""
    tokenizer = tiny_tokenizer()
    (number,) = tokenizer(stop)["input_ids"]
    lines = modelfile("base", None, PromptLayout(kind="raw", stop_token_ids=[number]), tokenizer)
    assert lines.endswith(f'PARAMETER stop """{stop}"""\n')


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("10\u00a0km\u202f!", r"Ollama drops U\+00A0, U\+202F of the system prompt"),
        ("答え\u3000はい", r"U\+3000"),
        ("👩\u200d🚀", r"U\+200D"),
        ('Say """x"""', 'a system prompt with """ in it'),
    ],
)
def test_a_prompt_that_ollama_reads_otherwise_is_refused(prompt: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"format=ollama: .*{says}.*format=gguf"):
        modelfile("base", None, PromptLayout(system_prompt=prompt, template=CHAT_TEMPLATE), tiny_tokenizer())


def test_lines_tabs_and_quotes_of_a_prompt_stay() -> None:
    prompt = 'Antworte "kurz":\n\t- è, 漢字, 🚀\r\n'
    lines = modelfile("base", None, PromptLayout(system_prompt=prompt, template=CHAT_TEMPLATE), tiny_tokenizer())
    assert f'SYSTEM """{prompt}"""\n' in lines


def test_template_that_is_more_than_its_turns_is_refused() -> None:
    with pytest.raises(ValueError, match="format=ollama: the chat template cannot be said in a Modelfile.*format=gguf"):
        turns_of(PromptLayout(template=ADDS_UP), tiny_tokenizer())


TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "ask", "parameters": {"limit": None, "strict": True, "text": 'a "b"\\n'}}}
]
OF_TOOLS = (
    "{% set own = messages[0]['role'] == 'system' %}"
    "{% if tools %}<|im_start|>system\n{{ messages[0]['content'] if own else 'You help.' }}\n"
    "{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m['role'] != 'system' or not tools %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n{% endif %}{% endif %}"
)
"""A template of Qwen 3's kind: tools in the system turn, and a variable that ends the thinking."""


@pytest.mark.parametrize("roles", PROBES, ids=len)
def test_tools_and_variables_of_the_template_go_along(roles: list[str]) -> None:
    """In Ollama's language and in Jinja: the prompt is that of training, without a word of it in the request."""
    layout = PromptLayout(template=OF_TOOLS, tools=TOOLS, template_options={"enable_thinking": False})
    tokenizer = tiny_tokenizer()
    messages = [{"role": role, "content": f"{number}, or so?"} for number, role in enumerate(roles)]
    turns = layout.going_on([Message(**message) for message in messages])
    expected = tokenizer.decode(layout.prompt(turns, tokenizer))
    assert "<think>" in expected and '"limit": null' in expected
    assert go(turns_of(layout, tokenizer).go_template(), messages) == expected
    template = template_as_trained(layout, tokenizer)
    options = {"chat_template": template, "tokenize": False, "add_generation_prompt": True}
    assert tokenizer.apply_chat_template(messages, **options) == expected
    thinking = tokenizer.apply_chat_template(messages, **options, enable_thinking=True)
    assert thinking == expected.removesuffix("<think>\n\n</think>\n")


@pytest.mark.parametrize("prompt", ['Say "a\\b"\nand {{ this }} {% now %}', "Grüße 'alle'"])
def test_chat_template_brings_the_trained_system_prompt(prompt: str) -> None:
    tokenizer = tiny_tokenizer()
    template = template_as_trained(PromptLayout(system_prompt=prompt), tokenizer)
    user, system = {"role": "user", "content": "hi"}, {"role": "system", "content": "other"}
    for messages, expected in (
        ([user], [{"role": "system", "content": prompt}, user]),
        ([system, user], [system, user]),
    ):
        said = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        assert said == tokenizer.apply_chat_template(expected, tokenize=False)
