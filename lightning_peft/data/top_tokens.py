"""The kept part of a teacher's distribution at each trained token: its likeliest tokens, and the mass of all others."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

IDS, LOG_PROBABILITIES, VOCABULARY = "ids.npy", "log_probabilities.npy", "vocabulary.npy"


@dataclass
class TopTokens:
    """A teacher's output at the N supervised tokens of a batch, in their order."""

    ids: Tensor
    """(N, k) int64, its likeliest tokens."""
    log_probabilities: Tensor
    """(N, k + 1) fp32 at the temperature of the loss, the last of all other tokens; (N, k) where k is all of them."""
    vocabulary: int
    """Tokens that both models have, among which these are probabilities."""


class KeptTeacher:
    """The kept distributions at every trained token of a set of samples, mapped from a folder."""

    def __init__(self, folder: Path, starts: NDArray[np.int64]) -> None:
        """Map files. starts (S + 1,): the trained tokens before each sample, then all. Raises OSError or ValueError."""
        self.ids = np.load(folder / IDS, mmap_mode="r")
        self.log_probabilities = np.load(folder / LOG_PROBABILITIES, mmap_mode="r")
        self.vocabulary = int(np.load(folder / VOCABULARY))
        self._starts = starts
        if len(self.ids) != starts[-1] or len(self.log_probabilities) != starts[-1]:
            raise ValueError(f"{folder}: holds {len(self.ids)} tokens, and the samples have {starts[-1]}")

    def of(self, sample: int) -> tuple[NDArray[np.int32], NDArray[np.float32], int]:
        """Return ids, log-probabilities and vocabulary of a sample's trained tokens."""
        span = slice(self._starts[sample], self._starts[sample + 1])
        return np.asarray(self.ids[span]), np.asarray(self.log_probabilities[span]), self.vocabulary


def trained_starts(trained: NDArray[np.uint8], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the trained tokens before each sample, whose first is never one, and all of them, (S + 1,)."""
    counted = (trained != 0).astype(np.int64)
    counted[starts[:-1]] = 0
    return np.concatenate([[0], counted.cumsum()])[starts]
