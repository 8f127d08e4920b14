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
_NEEDS_ID = (
    "{% if ID is not defined or ID | length != 9 %}{{ raise_exception('nine letters or digits as id') }}{% endif %}"
)
MISTRAL_LAST = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}{{ bos_token }}"
    "{% set place = namespace(at=0) %}"
    "{% set users = rest | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in rest %}{% if m.role != 'tool' and not m.tool_calls %}"
    "{% if (m.role == 'user') != (place.at % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set place.at = place.at + 1 %}{% endif %}"
    "{% if m.role == 'user' %}"
    "{% if tools and m == users[-1] %}{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + (system if loop.last else '') + m.content + '[/INST]' }}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for call in m.tool_calls %}"
    + _NEEDS_ID.replace("ID", "call.id")
    + """{{ (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + (']' if loop.last else ', ') }}"""
    "{% endfor %}{{ eos_token }}{% elif m.role == 'tool' %}"
    + _NEEDS_ID.replace("ID", "m.tool_call_id")
    + """{{ '[TOOL_RESULTS] {"content": ' + m.content + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}"""
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
TEKKEN = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}{% endif %}{% endfor %}"
    "{% if tools %}{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% elif m.role == 'tool' %}"
    "{{ '[TOOL_RESULTS]' + m.tool_call_id | string + '[TOOL_CONTENT]' + m.content + '[/TOOL_RESULTS]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content }}{% for call in m.tool_calls or [] %}"
    + _NEEDS_ID.replace("ID", "call.id")
    + "{{ '[TOOL_CALLS]' + call.function.name + '[CALL_ID]' + call.id + '[ARGS]' + call.function.arguments | tojson }}"
    "{% endfor %}{{ eos_token }}{% endif %}{% endfor %}"
)
OLMO = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
    "{{ (eos_token if m.role == 'assistant' else '') + ('' if m.role == 'assistant' and loop.last else '\n') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
OLMO_3 = (
    "{{ '<|im_start|>system\n' + (messages[0].content if messages[0].role == 'system' else 'You are Olmo.') }}"
    "{{ ' <functions>' + (tools | tojson if tools else '') + '</functions><|im_end|>\n' }}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}{{ '<|im_start|>environment\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' + m.content }}"
    "{% if m.tool_calls %}{{ '<function_calls>' }}{% for call in m.tool_calls %}"
    "{{ call.function.name + '(' }}{% for name, value in call.function.arguments.items() %}"
    "{{ name + '=' + value | tojson + ('' if loop.last else ', ') }}{% endfor %}{{ ')' + ('' if loop.last else '\n') }}"
    "{% endfor %}{{ '</function_calls>' }}{% endif %}"
    "{{ eos_token if loop.last else '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GRANITE = (
    "{% set say = namespace(system=messages[0].content if messages[0].role == 'system' else '') %}"
    "{% if tools %}{% set say.system = say.system + '\nTools:\n<tools>\n' + tools | tojson + '\n</tools>' %}"
    "{% endif %}{% if say.system %}"
    "{{ '<|start_of_role|>system<|end_of_role|>' + say.system + '<|end_of_text|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ '<|start_of_role|>user<|end_of_role|>\n<tool_response>\n' + m.content }}"
    "{{ '\n</tool_response><|end_of_text|>\n' }}"
    "{% elif m.role == 'user' or m.role == 'assistant' %}"
    "{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content }}{% for call in m.tool_calls or [] %}"
    "{{ ('\n' if m.content or not loop.first else '') + '<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}"
    "{% endfor %}{{ '<|end_of_text|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
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
    "olmo3": (OLMO_3, "<|endoftext|>"),
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
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|CALL_ID|ARGS|TOOL_CONTENT)\]|\[gMASK\]|<sop>"
)


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with the template of that name and the special tokens that it writes."""
    if name in OURS:
        template, eos = OURS[name]
    else:
        template, eos = (TRL / f"{name}.jinja").read_text(), STORED[name]
    tokenizer = tiny_tokenizer()
    special = {*_SPECIAL.findall(template), "<bos>", eos, "<|user|>", "<|assistant|>", "<|system|>"}
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(special)})
    tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token = template, "<bos>", eos
    return tokenizer
