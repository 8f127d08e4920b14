"""Origins of samples, file and line or source and row, in a few bytes each."""

import json
import re
from array import array
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUMBERED = re.compile(r"(.*?)(0|[1-9]\d{0,17})", re.DOTALL)
"""Pattern of a place and the number that it ends with, written as numbers are."""
NO_NUMBER = -1
FILES = ("origin_places", "origin_numbers")
"""Files of saved origins, each a .npy; the texts are in TEXTS."""
TEXTS = "origins.json"


class Origins:
    """The origin of each sample: a text that many share, and a number."""

    def __init__(self, texts: list[str], places: NDArray[np.int32], numbers: NDArray[np.int64]) -> None:
        """places (S,): which of the texts; numbers (S,): what stands behind it, NO_NUMBER for nothing."""
        self._texts, self._places, self._numbers = texts, places, numbers

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> str:
        text, number = self._texts[self._places[index]], int(self._numbers[index])
        return text if number == NO_NUMBER else f"{text}{number}"

    def save(self, folder: Path) -> None:
        parts: tuple[NDArray[Any], ...] = (self._places, self._numbers)
        for name, part in zip(FILES, parts, strict=True):
            np.save(folder / f"{name}.npy", part)
        (folder / TEXTS).write_text(json.dumps(self._texts), encoding="utf-8")

    @classmethod
    def mapped(cls, folder: Path) -> "Origins":
        """Return the origins that were saved there. Raises OSError, EOFError or ValueError."""
        places, numbers = (np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in FILES)
        return cls(json.loads((folder / TEXTS).read_text(encoding="utf-8")), places, numbers)


class GrowingOrigins:
    """Origins as they come."""

    def __init__(self) -> None:
        self._texts: dict[str, int] = {}
        self._places, self._numbers = array("i"), array("q")

    def add(self, origin: str) -> None:
        found = NUMBERED.fullmatch(origin)
        text, number = (origin, NO_NUMBER) if found is None else (found[1], int(found[2]))
        self._places.append(self._texts.setdefault(text, len(self._texts)))
        self._numbers.append(number)

    def origins(self) -> Origins | None:
        """Return what was added; None where nobody said where samples come from."""
        if self._texts.keys() <= {""}:
            return None
        return Origins(list(self._texts), np.asarray(self._places), np.asarray(self._numbers))
