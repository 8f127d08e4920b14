import random
import re

import pytest

from lightning_peft.data.end_tokens import EndTokens

TOKENS = ["<a>", "<bb>", "</s>", "<|x|>"]


@pytest.mark.parametrize("seed", range(5))
def test_ends_are_those_that_a_pattern_over_the_whole_text_finds(seed):
    either, rng, ends = "|".join(map(re.escape, TOKENS)), random.Random(seed), EndTokens([*TOKENS, ""])
    pattern = re.compile(rf"(?P<first>(?:{either})+)(?:\s*(?:{either}))*\s*\Z")
    for _ in range(2000):
        text = "".join(rng.choices([*TOKENS, " ", "\n", "x", "\t", "<", "s>"], k=rng.randrange(8)))
        after = rng.randrange(len(text) + 1) * rng.randrange(2)
        match = pattern.search(text, after)
        assert ends.find(text, after) == (match and match.span("first")), (text, after)


def test_text_without_tokens_has_no_end():
    assert EndTokens([]).find("x</s>") is None
    assert EndTokens(TOKENS).find("") is None
