"""The choice of an answer's tokens."""

from dataclasses import dataclass, replace
from typing import Self

SEEDS = 2**63
"""Number of seeds that torch's generators take."""


@dataclass
class SamplingConfig:
    """The rules by which tokens are chosen."""

    max_new_tokens: int = 256
    """Longest answer in tokens."""
    temperature: float = 0.0
    """0 takes the most likely token; above, tokens are drawn."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens that holds this probability."""
    seed: int = 0
    """Seed of the drawing; the answer to prompt i of a call, from 0, is drawn by seed + i, whatever is beside it."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"sampling.max_new_tokens={self.max_new_tokens}: must be at least 1")
        if not self.temperature >= 0:
            raise ValueError(f"sampling.temperature={self.temperature}: must be 0 (greedy) or above")
        if not 0 <= self.seed < SEEDS:
            raise ValueError(f"sampling.seed={self.seed}: must be from 0 to 2^63 - 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p={self.top_p}: must be above 0 and at most 1")
        if self.top_p < 1 and self.temperature == 0:
            raise ValueError(
                f"sampling.top_p={self.top_p}: at temperature 0 nothing is drawn; set sampling.temperature"
            )

    def of_answer(self, number: int) -> Self:
        """Return the rules for the answer to prompt `number` of a call: equal prompts draw different answers."""
        return replace(self, seed=(self.seed + number) % SEEDS)
