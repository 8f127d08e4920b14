"""Ollama's Modelfile: its template writes what the chat template writes."""

import re

import pytest

from lightning_peft.data.layout import PromptLayout
from lightning_peft.models.loading import load_tokenizer
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.tiny import CHAT_TEMPLATE, tiny_tokenizer
from lightning_peft.serving.ollama import PROBES, modelfile, turns_of
from lightning_peft.serving.prompt import template_with_system

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
    assert 'SYSTEM """Translate to SQL."""\nPARAMETER stop "<|endoftext|>"\nPARAMETER stop "<|im_end|>"\n' in lines


def test_text_without_turns_is_its_own_template() -> None:
    lines = modelfile("base", None, PromptLayout(kind="raw", stop_token_ids=[2]), tiny_tokenizer())
    assert lines == 'FROM base\nTEMPLATE """{{ .Prompt }}"""\nPARAMETER stop "<|im_end|>"\n'


def test_template_that_is_more_than_its_turns_is_refused() -> None:
    with pytest.raises(ValueError, match="format=ollama: the chat template cannot be said in a Modelfile.*format=gguf"):
        turns_of(PromptLayout(template=ADDS_UP), tiny_tokenizer())


@pytest.mark.parametrize("prompt", ['Say "a\\b"\nand {{ this }} {% now %}', "Grüße 'alle'"])
def test_chat_template_brings_the_trained_system_prompt(prompt: str) -> None:
    tokenizer = tiny_tokenizer()
    template = template_with_system(PromptLayout(system_prompt=prompt), tokenizer)
    user, system = {"role": "user", "content": "hi"}, {"role": "system", "content": "other"}
    for messages, expected in (
        ([user], [{"role": "system", "content": prompt}, user]),
        ([system, user], [system, user]),
    ):
        said = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        assert said == tokenizer.apply_chat_template(expected, tokenize=False)
