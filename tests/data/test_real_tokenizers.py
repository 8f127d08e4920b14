"""Tokenizers that models were published with, each with its template, where somebody has them on disk.

LIGHTNING_PEFT_TOKENIZERS names a folder of them: in each folder inside are tokenizer.json and tokenizer_config.json.
"""

import os
import random
from pathlib import Path

import pytest
from test_templates import CONVERSATIONS, applied, samples_by_turn
from transformers import AutoTokenizer

from lightning_peft.data.chat import encode_prompt, end_token_ids
from lightning_peft.data.conversation import Conversation, Message
from lightning_peft.data.template import ChatTemplateError

FOLDER = os.environ.get("LIGHTNING_PEFT_TOKENIZERS")
FOLDERS = sorted(path for path in Path(FOLDER).iterdir() if path.is_dir()) if FOLDER else []
PIECES = [
    "\n", "  ", "\t", "\r\n", "\u200d", "\U0001f468\u200d\U0001f469", "e\u0301", "\ufb01", "\u2460", "\u00a0", "\u2028",
    "\x00", "<|im_end|>", "[INST]", "\u2581", "\u2581\u2581a", "\ufeff", "a\u0308\u0323", "\u0e01\u0e47", "1234567",
    "``` ", "\uac00", "\u1100\u1161", "\u212b", "\U0001f600", " lead", "'s", "</s>x", "Hi", ".",
]  # fmt: skip


def random_text(rng):
    return "".join(rng.choices(PIECES, k=rng.randrange(1, 8)))


def random_conversation(rng):
    turns = [Message("system", f"{random_text(rng)}s")] if rng.random() < 0.2 else []
    for _ in range(rng.randrange(1, 4)):
        turns += [
            Message("user", f"{random_text(rng)}u"),
            Message("assistant", f"{random_text(rng)}a{random_text(rng)}"),
        ]
    return Conversation(turns)


@pytest.mark.slow
@pytest.mark.skipif(not FOLDERS, reason="LIGHTNING_PEFT_TOKENIZERS names no folder of tokenizers")
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_published_tokenizer_trains_what_its_template_writes(folder):
    tokenizer, rng, refused = AutoTokenizer.from_pretrained(folder), random.Random(folder.name), 0
    ends = [tokenizer.decode([token]) for token in end_token_ids(tokenizer)]
    conversations = [*CONVERSATIONS.values(), *(random_conversation(rng) for _ in range(200))]
    for conversation in conversations:
        try:
            turns = samples_by_turn(tokenizer, conversation)
        except ChatTemplateError:
            refused += 1
            continue
        answers = [index for index, message in enumerate(conversation) if message.role == "assistant"]
        assert len(turns) == len(answers)
        for (prompt_ids, trained_ids), index in zip(turns, answers, strict=True):
            before, message = conversation.before(index), conversation[index]
            prompt, whole = (
                applied(tokenizer, conversation, some, generation)
                for some, generation in ((before, True), (conversation[: index + 1], False))
            )
            thinks = message.reasoning is not None and prompt.rstrip().endswith("</think>")
            assert thinks or prompt_ids == encode_prompt(before, tokenizer)
            if index == answers[0] and not thinks:
                assert prompt_ids == tokenizer(prompt, add_special_tokens=False)["input_ids"]
            trained = tokenizer.decode(trained_ids)
            assert trained.endswith(tuple(ends))
            if whole.startswith(prompt):
                said = tokenizer.decode(tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"])
                assert said.split() and trained.split() == said.split()[: len(trained.split())]
    assert refused < len(conversations) / 2
