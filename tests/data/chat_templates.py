"""Chat templates to try: those that `trl` stores, and short ones that do what models do which it does not store."""

import re
from pathlib import Path

import trl
from transformers import PreTrainedTokenizerFast

from lightning_peft.models.tiny import tiny_tokenizer

TRL = Path(trl.__file__).parent / "chat_templates"

# Written here: each does to messages what the named models' templates do, in fewer words.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM_2 = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL_FIRST = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_LAST = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + (system if loop.last else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
TEKKEN = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}"
    "{% elif m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
OLMO = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
    "{{ (eos_token if m.role == 'assistant' else '') + ('' if m.role == 'assistant' and loop.last else '\n') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
GRANITE = (
    "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
SMOLLM_3 = (
    "{% set thinks = enable_thinking | default(true) %}{% set said = '' %}"
    "{% if messages[0].role == 'system' %}{% set said = messages[0].content %}"
    "{% if '/no_think' in said %}{% set thinks = false %}{% endif %}"
    "{% set said = said.replace('/no_think', '').replace('/think', '').rstrip() %}{% endif %}"
    "{{ '<|im_start|>system\n## Metadata\n\nToday Date: ' + strftime_now('%d %B %Y') + '\nReasoning Mode: ' }}"
    "{{ ('/think' if thinks else '/no_think') + '\n\n## Custom Instructions\n\n' }}"
    "{{ (said or 'Answer as well as you can.') + '\n\n' }}"
    "{% if xml_tools %}{{ '### Tools\n\n' + xml_tools | tojson + '\n\nReturn calls as <tool_call>\n{}\n</tool_call>' }}"
    "{% endif %}{{ '<|im_end|>\n' }}"
    "{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}"
    "{% if thinks %}{{ '<|im_start|>assistant\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}"
    "{% endif %}"
    "{% elif m.role == 'tool' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + ('' if thinks else '<think>\n\n</think>\n') }}"
    "{% endif %}"
)
PHI_4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
PHI_4_MINI = (
    "{% for m in messages %}"
    "{% if m.role == 'system' and m.tools is defined and m.tools is not none %}"
    "{{ '<|system|>' + m.content + '<|tool|>' + m.tools + '<|/tool|><|end|>' }}"
    "{% else %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
OPENS_THOUGHT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
OURS = {
    "chatml": (CHATML, "<|im_end|>"),
    "smollm2": (SMOLLM_2, "<|im_end|>"),
    "mistral_v0.1": (MISTRAL_FIRST, "</s>"),
    "mistral_v0.3": (MISTRAL_LAST, "</s>"),
    "tekken": (TEKKEN, "</s>"),
    "olmo": (OLMO, "<|endoftext|>"),
    "granite": (GRANITE, "<|end_of_text|>"),
    "smollm3": (SMOLLM_3, "<|im_end|>"),
    "phi4": (PHI_4, "<|im_end|>"),
    "phi4_mini": (PHI_4_MINI, "<|endoftext|>"),
    "opens_thought": (OPENS_THOUGHT, "<|im_end|>"),
}

STORED = {
    "llama3": "<|eot_id|>", "llama3_1": "<|eot_id|>", "llama3_2": "<|eot_id|>",
    "qwen2_5": "<|im_end|>", "qwen3": "<|im_end|>", "qwen3_instruct_2507": "<|im_end|>",
    "qwen3_5_think": "<|im_end|>", "qwen3_5_nothink": "<|im_end|>", "qwen3_6": "<|im_end|>", "qwen3_8": "<|im_end|>",
    "gemma": "<end_of_turn>", "gemma3": "<end_of_turn>", "gemma4": "<turn|>", "gemma4_v5": "<turn|>",
    "phi3": "<|endoftext|>", "phi3_5": "<|endoftext|>", "glm4moe": "<|endoftext|>",
    "deepseekv3": "<｜end▁of▁sentence｜>", "deepseek_r1_distill": "<｜end▁of▁sentence｜>",
    "cohere": "<|END_OF_TURN_TOKEN|>", "cohere2": "<|END_OF_TURN_TOKEN|>", "gptoss": "<|return|>",
    "nemotron_3_nano": "<|im_end|>", "nemotron_3_super": "<|im_end|>", "nemotron_3_ultra": "<|im_end|>",
    "lfm2": "<|im_end|>", "lfm2_v2": "<|im_end|>", "lfm2_2_5": "<|im_end|>", "lfm2_2_5_v2": "<|im_end|>",
    "gemma4_v2": "<turn|>", "gemma4_v3": "<turn|>", "gemma4_v4": "<turn|>", "nemotron_3_5_lightning": "<|im_end|>",
    "muse_glimmer": "<|im_end|>",
}  # fmt: skip
"""Templates of `trl`, each with the EOS of its models."""

_SPECIAL = re.compile(
    r"<\|[\w ]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_turn>|<\|?(?:turn|channel|tool_call|tool_response|tool)\|?>"
    r"|\[/?INST\]|\[/?SYSTEM_PROMPT\]|\[gMASK\]|<sop>"
)


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the template of that name and the special tokens that it writes."""
    if name in OURS:
        template, eos = OURS[name]
    else:
        template, eos = (TRL / f"{name}.jinja").read_text(), STORED[name]
    tokenizer = tiny_tokenizer()
    special = {*_SPECIAL.findall(template), "<bos>", eos, "<|user|>", "<|assistant|>", "<|system|>"}
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(special)})
    tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token = template, "<bos>", eos
    return tokenizer
