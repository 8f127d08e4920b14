"""Numbers of elements written in the letters of the model: 4 x (60 D F + 30 B T D)."""

import math
from collections import Counter

import torch
from transformers import PreTrainedConfig

from lightning_peft.estimation.recorder import Array, Held

ORDER = "B T N H G d D F V R".split()


class Symbols:
    """Letters for the sizes of one estimate: B rows, T tokens, N = B T, D width, F inner width of the feed-forward,
    V vocabulary, H heads, G key-value heads, d head dimension, R rank."""

    def __init__(self, config: PreTrainedConfig, rows: int, length: int, rank: int | None):
        text = config.get_text_config()
        heads = text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        groups = getattr(text, "num_key_value_heads", None) or heads
        self.sizes = {
            "D": text.hidden_size, "F": getattr(text, "intermediate_size", None), "V": text.vocab_size, "B": rows,
            "T": length, "N": rows * length, "H": heads, "G": groups, "d": head_dim, "R": rank,
        }  # fmt: skip
        products = [("D",), ("F",), ("V",), ("B", "T"), ("T",), ("H", "d"), ("G", "d"), ("R",), ("H",), ("G",), ("d",)]
        self.products: dict[int, tuple[str, ...]] = {}
        for letters in products:
            factors = [self.sizes[letter] for letter in letters]
            if all(factors):
                self.products.setdefault(math.prod(f for f in factors if f), letters)
        if rows > 1:
            self.products.setdefault(rows, ("B",))

    def legend(self) -> str:
        used = [f"{letter} = {self.sizes[letter]:,}" for letter in ORDER if letter != "N" and self.sizes[letter]]
        return ", ".join(used)

    def term(self, shape: tuple[int, ...]) -> tuple[int, tuple[str, ...]]:
        """Return a number and the letters it is multiplied by."""
        factor = 1
        letters: list[str] = []
        for size in shape:
            if size == 1:
                continue
            if size in self.products:
                letters += self.products[size]
                continue
            # Codes are (D, F / 2), their scales (D, F / 64), so the number that is left stays a divisor of a letter.
            factor *= size
        return factor, tuple(sorted(letters, key=ORDER.index))

    def formula(self, held: Held) -> str:
        """Return the bytes of these storages: a sum of products, by size of element. Numbers below a percent end in
        "...".
        """
        by_size: dict[int, Counter[tuple[str, ...]]] = {}
        for (_, array), count in held.items():
            if count:
                factor, letters = self.term(array.shape)
                by_size.setdefault(array.dtype.itemsize, Counter())[letters] += count * factor
        parts = []
        for itemsize, terms in sorted(by_size.items(), reverse=True):
            ranked = sorted(terms.items(), key=lambda term: -term[1] * self.value(term[0]))
            text = " + ".join(f"{count:,} {' '.join(letters)}".strip() for letters, count in ranked)
            parts.append(f"{itemsize} x ({text})")
        return " + ".join(parts)

    def value(self, letters: tuple[str, ...]) -> int:
        return math.prod(self.sizes[letter] or 1 for letter in letters)


def array_of(tensor: torch.Tensor) -> Array:
    return Array(tuple(tensor.shape), tensor.dtype)
