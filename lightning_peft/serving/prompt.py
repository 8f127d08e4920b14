"""The prompt an adapter was trained with, in the words of other engines: a chat template that brings it along."""

import json

from transformers import PreTrainedTokenizerBase

from lightning_peft.data.layout import PromptLayout

TEMPLATE_NAME = "chat_template.jinja"


def template_with_system(layout: PromptLayout, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the chat template of an adapter; one that adds the trained system prompt where a chat brings none.

    None for text without turns.
    """
    template = layout.template or tokenizer.chat_template
    if layout.kind != "chat" or not isinstance(template, str):
        return None
    if layout.system_prompt is None:
        return template
    # JSON's strings are Jinja's, but for escapes beyond ASCII, which are left as they are.
    text = json.dumps(layout.system_prompt, ensure_ascii=False)
    return (
        "{%- if not messages or messages[0]['role'] != 'system' %}"
        f"{{%- set messages = [{{'role': 'system', 'content': {text}}}] + messages %}}{{%- endif %}}{template}"
    )


def stop_texts(layout: PromptLayout, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the tokens at which an answer ends, as text."""
    return [str(tokenizer.convert_ids_to_tokens(number)) for number in layout.stop_token_ids]


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer puts its first token before every text, as engines then do too."""
    return tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
