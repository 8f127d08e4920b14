"""The most memory a process has held at once."""

import resource
import threading
from pathlib import Path
from typing import Any

import torch


def anonymous_bytes(process: int | str = "self") -> int:
    """Return a process's resident memory that no file backs: mapped weights do not count. 0 for one that is gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024 if "RssAnon:" in status else 0


def synchronize() -> None:
    """Wait until the device, if this process uses one, has done all it was told."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


class PeakMemory:
    """Watches this process from its creation on; create it after the imports and before the model is loaded.

    The watching thread wakes a hundred times a second, which costs a step on two cores a tenth of its time: after
    `stop_watching` the memory is read where `look` is called.
    """

    def __init__(self, interval: float = 0.01):
        self.before = self.peak = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(interval,), daemon=True)
        self._thread.start()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def _watch(self, interval: float) -> None:
        while not self._stop.wait(interval):
            self.look()

    def look(self) -> None:
        now = anonymous_bytes()
        self.peak = max(self.peak, now)

    def stop_watching(self) -> None:
        self._stop.set()
        self._thread.join()

    def stop(self) -> dict[str, Any]:
        """Return the peaks in GiB: anonymous memory above the start, whole resident set, allocated on the device."""
        self.stop_watching()
        peaks = {
            "anonymous_gib": (self.peak - self.before) / 2**30,
            "resident_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            peaks["device_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return peaks
