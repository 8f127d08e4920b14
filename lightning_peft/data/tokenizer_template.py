"""The chat template that a tokenizer brings, or the plain one, checked once and kept."""

import json
import logging
import re
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_peft.data.template import ChatTemplate, ChatTemplateError

log = logging.getLogger(__name__)

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content + '\\n\\n' }}"
    "{% elif message.role == 'user' %}{{ 'User: ' + message.content + '\\n' }}"
    "{% else %}{{ 'Assistant: ' + message.content + eos_token + '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""The template for tokenizers that bring no chat template."""

TEMPLATE_DATE = datetime(2024, 7, 26)
"""The date that templates take for today: one day for every start of a run, and for training and generation. Llama 3's
templates fall back to the same one."""

_TODAY = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>.*?)(?P=quote)\s*\)""")


def template_of(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None) -> ChatTemplate:
    """Return the tokenizer's chat template, or the plain one. Raises ChatTemplateError for an unusable template."""
    log_layout(tokenizer)
    variables = json.dumps([_special_tokens(tokenizer), dict(options or {})], sort_keys=True)
    return _checked_template(_template_source(tokenizer), variables)


@lru_cache(maxsize=8)
def _checked_template(source: str, variables: str) -> ChatTemplate:
    template = ChatTemplate(source, *json.loads(variables))
    template.check()
    return template


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    tokens = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    if tokenizer.chat_template in (
        None,
        "",
        PLAIN_TEMPLATE,
    ):
        tokens = {"bos_token": "", "eos_token": ""} | tokens
    return tokens


def log_layout(tokenizer: PreTrainedTokenizerBase) -> None:
    """Say, once, where conversations are laid out without a template of the tokenizer, or with a date in them."""
    if not tokenizer.chat_template:
        _log_plain_layout(tokenizer.name_or_path)
    elif "strftime_now" in str(tokenizer.chat_template):
        _log_date(tokenizer.name_or_path)


def _template_source(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        return PLAIN_TEMPLATE
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        names = ", ".join(tokenizer.chat_template) if isinstance(tokenizer.chat_template, dict) else ""
        raise ChatTemplateError(
            f"the tokenizer has several chat templates ({names}) and none is its default; "
            "name one of them default in its files"
        ) from error
    return _TODAY.sub(lambda call: repr(TEMPLATE_DATE.strftime(call["format"])), template)


@lru_cache
def _log_plain_layout(name: str) -> None:
    log.warning("The tokenizer %s has no chat template: using the plain layout 'User: ...', 'Assistant: ...'.", name)


@lru_cache
def _log_date(name: str) -> None:
    log.info("The chat template of %s writes today's date: it is always %s here.", name, TEMPLATE_DATE.date())
