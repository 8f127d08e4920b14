"""The samples of a mixture, and the order in which they come."""

import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from lightning_peft.data.chat import Encoded
from lightning_peft.data.mixture import MixedSource
from lightning_peft.data.packing import MicroBatch
from lightning_peft.data.token_store import Samples


class MixedSamples:
    """The samples of several sources as one set, numbered through."""

    def __init__(self, parts: Sequence[Samples]) -> None:
        self.parts = list(parts)
        self.group = parts[0].group
        self.lengths = [length for part in parts for length in part.lengths]
        self.firsts = [0, *accumulate(len(part) // part.group for part in parts)]
        """The number of each source's first unit, then the number of all units."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Encoded:
        return self.unit(index // self.group)[index % self.group]

    def source_of(self, unit: int) -> int:
        """Return which source a unit is of."""
        return bisect_right(self.firsts, unit) - 1

    def unit(self, index: int) -> list[Encoded]:
        """Return the samples of unit `index`, which belong together."""
        source = self.source_of(index)
        return self.parts[source].unit(index - self.firsts[source])

    @cached_property
    def unit_lengths(self) -> list[int]:
        """Return the tokens of each unit."""
        return [length for part in self.parts for length in part.unit_lengths]

    @cached_property
    def fingerprint(self) -> str:
        """Return eight hex digits that change with any token, label, weight or boundary of any source."""
        return f"{crc32(' '.join(part.fingerprint for part in self.parts).encode()):08x}"

    @property
    def largest_token(self) -> int:
        """Return the highest token id; -1 without samples."""
        return max(part.largest_token for part in self.parts)

    @cached_property
    def digests(self) -> NDArray[np.uint64]:
        """Return (U,) a number for each unit that is another where its tokens or labels are."""
        return np.concatenate([part.digests for part in self.parts])


class MixturePlan:
    """The micro batches of each epoch of a mixture, a function of seed and epoch alone.

    A source is an endless row of passes over its units, each in an order of its own. The mixture comes in windows as
    large as all sources together: window k has of a source the units that begin within tokens [k q, (k + 1) q) of its
    row, q being its share of a window. So shares hold to a sample in each window, and over the run. The units of a
    window are packed together, whatever source they are of. An epoch is as many micro batches as the first window has.
    """

    def __init__(
        self,
        samples: MixedSamples,
        sources: Sequence[MixedSource],
        shares: Sequence[float],
        seed: int,
        plan: Callable[[list[int], random.Random], list[MicroBatch]],
    ) -> None:
        """Plan windows over the sources; `plan` makes micro batches of units of the lengths it is given."""
        self._firsts = samples.firsts
        self._lengths = [np.asarray(part.unit_lengths, dtype=np.int64) for part in samples.parts]
        self._sources = sources
        self._shares = shares
        self._seed = seed
        self._plan = plan
        self._tokens = sum(int(some.sum()) for some, share in zip(self._lengths, shares, strict=True) if share)
        self._counts: list[int] = []
        """Micro batches of each window so far."""
        self._first = self._window(0)

    def __call__(self, epoch: int) -> list[MicroBatch]:
        """Return the micro batches of an epoch."""
        per_epoch = len(self._first)
        begin, stop, found = epoch * per_epoch, (epoch + 1) * per_epoch, []
        number = passed = 0
        while passed < stop:
            if number < len(self._counts) and passed + self._counts[number] <= begin:
                passed += self._counts[number]
            else:
                window = self._window(number)
                found += window[max(0, begin - passed) : stop - passed]
                passed += len(window)
            number += 1
        return found

    @property
    def passes(self) -> list[float]:
        """Return the passes over each source in an epoch, until it has come to its end."""
        return [
            self._tokens * share / int(some.sum()) if share else 0.0
            for some, share in zip(self._lengths, self._shares, strict=True)
        ]

    def _window(self, number: int) -> list[MicroBatch]:
        if number == 0 and self._counts:
            return self._first
        drawn = np.concatenate([self._drawn(source, number) for source in range(len(self._sources))])
        lengths = np.concatenate(self._lengths)[drawn].tolist()
        batches = self._plan(lengths, random.Random(f"{self._seed} {number}"))
        if number == len(self._counts):
            self._counts.append(len(batches))
        return [[[int(drawn[place]) for place in row] for row in batch] for batch in batches]

    def _drawn(self, source: int, window: int) -> NDArray[np.int64]:
        """Return the numbers of the units that a window has of a source."""
        lengths, quota = self._lengths[source], self._tokens * self._shares[source]
        low, high = round(window * quota), round((window + 1) * quota)
        found = [np.empty(0, dtype=np.int64)]
        if not quota:
            return found[0]
        size, most = int(lengths.sum()), self._sources[source].max_epochs
        last = -(-high // size) if most is None else min(-(-high // size), most)
        for number in range(low // size, last):
            order = list(range(len(lengths)))
            random.Random(f"{self._seed} {self._sources[source].name} {number}").shuffle(order)
            ends = lengths[order].cumsum() + number * size
            begins = ends - lengths[order]
            found.append(np.asarray(order, dtype=np.int64)[(begins >= low) & (begins < high)])
        return np.concatenate(found) + self._firsts[source]
