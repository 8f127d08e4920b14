"""Tokenised samples as they are kept: five bytes a token, in memory or mapped from files."""

import zlib
from array import array
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_peft.data.batch import IGNORED_LABEL
from lightning_peft.data.chat import Encoded
from lightning_peft.data.origins import TEXTS, GrowingOrigins, Origins
from lightning_peft.data.preferences import Standing
from lightning_peft.data.rendering import TokenKind
from lightning_peft.data.top_tokens import KeptTeacher, trained_starts

PARTS = ("tokens", "trained", "starts")
"""Files of saved samples, each a .npy."""
WEIGHTS = "weights"
"""One more file where a token's loss has a factor other than 1."""
STANDINGS = "standings"
"""One more file where samples belong together."""
TAUGHT = "taught"
"""Folder of the samples that a teacher reads in place of these."""
MARGINS = "margins"
"""One more file where pairs have margins."""


class Samples:
    """Tokenised samples, five bytes a token, in memory or mapped from the files of `save`."""

    def __init__(
        self,
        tokens: NDArray[np.int32],
        trained: NDArray[np.uint8],
        starts: NDArray[np.int64],
        weights: NDArray[np.float32] | None = None,
        standings: NDArray[np.uint8] | None = None,
        margins: NDArray[np.float32] | None = None,
        taught: "Samples | None" = None,
        origins: Origins | None = None,
    ) -> None:
        """Keep the arrays. tokens, trained (a `TokenKind` each) and weights (T,): the samples one after the other.

        starts (S + 1,): where they begin, then T. standings (U, G): a `Standing` each, where G samples that follow each
        other make one of U units; None where each sample stands alone. margins (U,): of pairs; None where all are 0.
        """
        self._parts: tuple[NDArray[Any], ...] = (tokens, trained, starts)
        self._weights = weights
        self._standings = standings
        self._margins = margins
        self._origins = origins
        self.taught = taught
        """The samples that a teacher reads in the place of these; None where it reads the same."""
        self._kept: KeptTeacher | None = None
        self.group: int = 1 if standings is None else standings.shape[1]
        """Number of samples that belong together."""
        self.lengths: list[int] = np.diff(starts).tolist()

    @classmethod
    def of(cls, samples: Iterable[Encoded], group: int = 1) -> "Samples":
        growing = Growing()
        for sample in samples:
            growing.add(sample)
        return growing.samples(group)

    def save(self, folder: Path) -> None:
        for name, part in zip(PARTS, self._parts, strict=True):
            np.save(folder / f"{name}.npy", part)
        if self._weights is not None:
            np.save(folder / f"{WEIGHTS}.npy", self._weights)
        if self._standings is not None:
            np.save(folder / f"{STANDINGS}.npy", self._standings)
        if self._margins is not None:
            np.save(folder / f"{MARGINS}.npy", self._margins)
        if self._origins is not None:
            self._origins.save(folder)
        if self.taught is not None:
            (folder / TAUGHT).mkdir()
            self.taught.save(folder / TAUGHT)

    @classmethod
    def mapped(cls, folder: Path) -> "Samples":
        """Return the samples saved in a folder, read on demand. Raises OSError, EOFError or ValueError."""
        tokens, trained, starts = (np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in PARTS)
        more = [folder / f"{name}.npy" for name in (WEIGHTS, STANDINGS, MARGINS)]
        weights, standings, margins = (
            np.asarray(np.load(path, mmap_mode="r")) if path.exists() else None for path in more
        )
        taught = cls.mapped(folder / TAUGHT) if (folder / TAUGHT).is_dir() else None
        origins = Origins.mapped(folder) if (folder / TEXTS).exists() else None
        return cls(tokens, trained, starts, weights, standings, margins, taught, origins)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Encoded:
        """Return sample `index`; the audit counts whether it ends or was cut, which is not kept here."""
        tokens, trained, starts = self._parts
        span = slice(starts[index], starts[index + 1])
        ids = tokens[span].tolist()
        kinds = trained[span].tobytes()
        labels = [token if kind else IGNORED_LABEL for token, kind in zip(ids, kinds, strict=True)]
        weights = None if self._weights is None else self._weights[span].tolist()
        standing = None if self._standings is None else Standing(int(self._standings.flat[index]))
        margin = None
        if self._margins is not None and index % self.group == 0:
            margin = float(self._margins[index // self.group])
        taught = None if self.taught is None else self.taught[index]
        return Encoded(
            ids, labels, ends=False, kinds=kinds, weights=weights, standing=standing, taught=taught, margin=margin,
            top=None if self._kept is None else self._kept.of(index),
            origin="" if self._origins is None else self._origins[index],
        )  # fmt: skip

    @cached_property
    def trained_starts(self) -> NDArray[np.int64]:
        """Return the trained tokens before each sample, and all of them, (S + 1,)."""
        _, trained, starts = self._parts
        return trained_starts(trained, starts)

    def keep_teacher(self, folder: Path) -> None:
        """Let the samples have what is kept of a teacher in a folder."""
        self._kept = KeptTeacher(folder, self.trained_starts)

    def unit(self, index: int) -> list[Encoded]:
        """Return the samples of unit `index`, which belong together."""
        return [self[index * self.group + place] for place in range(self.group)]

    @cached_property
    def unit_lengths(self) -> list[int]:
        """Return the tokens of each unit."""
        return np.asarray(self.lengths, dtype=np.int64).reshape(-1, self.group).sum(1).tolist()

    @cached_property
    def fingerprint(self) -> str:
        """Return eight hex digits that change with any token, label, weight or boundary."""
        tokens, trained, starts = self._parts
        checksum = 0
        parts = [tokens, (trained != 0).view(np.uint8), starts]
        more = (self._weights, self._standings, self._margins)
        for part in [*parts, *(part for part in more if part is not None)]:
            checksum = zlib.crc32(part.data, checksum)
        if self.taught is not None:
            checksum = zlib.crc32(self.taught.fingerprint.encode(), checksum)
        return f"{checksum:08x}"

    @property
    def largest_token(self) -> int:
        """Return the highest token id; -1 without samples."""
        own = int(self._parts[0].max()) if len(self._parts[0]) else -1
        return own if self.taught is None else max(own, self.taught.largest_token)

    @cached_property
    def digests(self) -> NDArray[np.uint64]:
        """Return (U,) a number for each unit that differs where tokens or labels do, so that copies can be told."""
        tokens, trained, starts = self._parts
        bounds = zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)

        def digest(start: int, stop: int) -> int:
            ids = tokens[start:stop].data
            return zlib.crc32(ids) << 32 | zlib.crc32(ids, zlib.crc32(trained[start:stop].data))

        digests = np.fromiter((digest(*bound) for bound in bounds), dtype=np.uint64, count=len(self))
        if self._standings is None:
            return digests
        own = digests.reshape(self._standings.shape) * (self._standings != Standing.mismatched)
        return (own * (self._standings.astype(np.uint64) * np.uint64(2) + np.uint64(1))).sum(1, dtype=np.uint64)


class Growing:
    """Samples as they come, in arrays that grow; so are those that a teacher reads in their place."""

    def __init__(self) -> None:
        self.tokens, self.trained, self.starts = array("i"), array("B"), array("q", [0])
        self.standings = array("B")
        self.weights: array[float] | None = None
        self.margins: list[float | None] = []
        self.taught: Growing | None = None
        self.origins = GrowingOrigins()

    def add(self, sample: Encoded) -> None:
        if sample.taught is not None:
            self.taught = self.taught or Growing()
            self.taught.add(sample.taught)
        if sample.weights is not None and self.weights is None:
            self.weights = array("f", [1.0]) * len(self.tokens)
        if self.weights is not None:
            self.weights.extend(sample.weights or [1.0] * len(sample.input_ids))
        if sample.standing is not None:
            self.standings.append(sample.standing)
            self.margins.append(sample.margin)
        self.origins.add(sample.origin)
        self.tokens.extend(sample.input_ids)
        self.trained.frombytes(kinds_of(sample))
        self.starts.append(len(self.tokens))

    def samples(self, group: int) -> Samples:
        """Return what was added, `group` samples of which belong together."""
        assert self.taught is None or len(self.taught.starts) == len(self.starts), "all or none read another text"
        factors = None if self.weights is None else np.asarray(self.weights)
        together = None if group == 1 else np.asarray(self.standings, dtype=np.uint8).reshape(-1, group)
        of_units = self.margins[::group]
        ahead = np.asarray([margin or 0.0 for margin in of_units], dtype=np.float32)
        return Samples(
            np.asarray(self.tokens), np.asarray(self.trained), np.asarray(self.starts), factors, together,
            ahead if any(margin is not None for margin in of_units) else None,
            None if self.taught is None else self.taught.samples(1),
            self.origins.origins(),
        )  # fmt: skip


def kinds_of(sample: Encoded) -> bytes:
    """Return a `TokenKind` for each token of a sample; answer for every label where the sample says none."""
    if sample.kinds is not None:
        return sample.kinds
    return bytes(0 if label == IGNORED_LABEL else TokenKind.answer for label in sample.labels)
