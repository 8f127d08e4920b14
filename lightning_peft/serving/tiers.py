"""The places of adapters: all are on disk, the ones used last on the host, a few in slots beside the model."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from lightning_peft.adapters.slots import Factors, Slots, are_finite, cast_factors
from lightning_peft.checkpoint.peft_format import read_low_rank
from lightning_peft.inference.load import adapter_folder
from lightning_peft.serving.adapter_checks import NAME, adapters_in


class UnknownModelError(KeyError):
    """A model name that is neither the base nor an adapter."""


class AdapterTiers:
    """Adapters of one base by name, loaded and used by one thread; a slot in use keeps its adapter.

    `folders` are the registered adapters; with `directory` every folder in it is one too, by its name. `check` raises
    ValueError for the folder of an adapter that is not the base's, `try_slot` where the model cannot be asked through
    the adapter in a slot.
    """

    def __init__(
        self,
        slots: Slots,
        host_limit: int,
        check: Callable[[Path], object],
        directory: Path | None = None,
        try_slot: Callable[[int], object] = lambda slot: None,
    ):
        self.slots, self.host_limit, self.directory = slots, host_limit, directory
        self.check, self.try_slot = check, try_slot
        self.folders: dict[str, Path] = {}
        self.host: OrderedDict[Path, Factors] = OrderedDict()
        self.in_slot: list[Path | None] = [None] * slots.count
        self.users = [0] * slots.count
        self.order: list[int] = list(range(slots.count))
        """Slots, the one used longest ago first."""
        self.loads = {"disk": 0, "host": 0}

    def names(self) -> list[str]:
        """Return the name of every adapter that there is."""
        return list(dict.fromkeys([*self.folders, *adapters_in(self.directory)]))

    def folder(self, name: str) -> Path:
        """Return the adapter folder of a name. Raises UnknownModelError."""
        if name in self.folders:
            return self.folders[name]
        if self.directory is not None and NAME.fullmatch(name) and (self.directory / name).is_dir():
            return adapter_folder(str(self.directory / name), "model")
        raise UnknownModelError(name)

    def on_host(self, folder: Path) -> Factors:
        """Return an adapter as the slots take it, read from disk where it is not here. Raises ValueError."""
        if folder in self.host:
            self.host.move_to_end(folder)
            return self.host[folder]
        factors = self.read(folder)
        self.keep(folder, factors)
        return factors

    def read(self, folder: Path) -> Factors:
        """Return an adapter as it lies on disk, in the slots' dtype; any thread may ask. Raises ValueError."""
        self.check(folder)
        factors = cast_factors(read_low_rank(folder), self.slots.dtype)
        rank = max(A.shape[0] for A, _ in factors.values())
        if rank > self.slots.rank:
            raise ValueError(f"{folder}: is of rank {rank}, the slots of {self.slots.rank}; set serve.max_rank={rank}")
        if not are_finite(factors):
            raise ValueError(f"{folder}: has numbers that are not finite, in {self.slots.dtype}; it has no answers")
        return factors

    def keep(self, folder: Path, factors: Factors) -> None:
        """Keep an adapter that was read, in the place of the one used longest ago."""
        self.loads["disk"] += 1
        self.host[folder] = factors
        while len(self.host) > self.host_limit:
            self.host.popitem(last=False)

    def acquire(self, folder: Path) -> int | None:
        """Return the number of the slot that holds an adapter, which it keeps until `release`.

        None comes back while all slots are in use, but for slots on the host: there is always one more of these.
        """
        if folder in self.in_slot:
            slot = self.in_slot.index(folder)
        else:
            unused = [slot for slot in self.order if self.users[slot] == 0]
            free = min(unused, key=lambda slot: slot >= self.slots.count, default=None)
            if free is None and self.slots.on_host:
                free = self._one_more()
            if free is None:
                return None
            slot, factors = free, self.on_host(folder)
            self.in_slot[slot] = None  # the loading may fail halfway
            self._load(slot, folder, factors)
            self.loads["host"] += 1
            self.in_slot[slot] = folder
        self.users[slot] += 1
        self.order.remove(slot)
        self.order.append(slot)
        return slot

    def _load(self, slot: int, folder: Path, factors: Factors) -> None:
        """Put an adapter into a slot; layers that none has changed before are tried. Raises ValueError."""
        known = len(self.slots.layers)
        try:
            self.slots.load(slot, factors, known_finite=True)
            if len(self.slots.layers) > known:
                self.try_slot(slot)
        except Exception as error:
            self.slots.take_back(slot, known)
            if isinstance(error, ValueError):
                raise ValueError(f"{folder}: {error}") from error
            raise

    def _one_more(self) -> int:
        self.order.append(slot := len(self.in_slot))
        self.in_slot.append(None)
        self.users.append(0)
        return slot

    def release(self, slot: int) -> None:
        """Give up what `acquire` returned. Slots beyond `count` keep no adapter that nobody uses."""
        self.users[slot] -= 1
        if slot >= self.slots.count and self.users[slot] == 0:
            self.slots.unload(slot)
            self.in_slot[slot] = None

    def release_all(self) -> None:
        """Empty the slots, after a failure in the middle of something."""
        for slot in range(len(self.in_slot)):
            if self.slots.on_host:
                self.slots.unload(slot)
            self.users[slot], self.in_slot[slot] = 0, None

    def forget(self, folder: Path) -> None:
        """Read a folder anew when it is next asked for; requests in flight end with what they began with."""
        self.host.pop(folder, None)
        for slot, held in enumerate(self.in_slot):  # in place: meanwhile the engine's thread may release another
            if held == folder:
                self.in_slot[slot] = None
