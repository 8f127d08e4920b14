"""The time that OpenMP's threads spin while they wait, which follows what else their cores do.

Threads that spin for each other are woken sooner: on quiet cores a short step takes a fifth less time than with threads
that sleep. Where another process wants a core, a thread that spins takes the time of the one it waits for. libgomp goes
over to sleeping by itself in a process that has more threads than there are cores; so while neighbours are busy, a
second pool of threads is kept, asleep, beside the one that computes.
"""

import atexit
import os
import sys
import threading
import time
from pathlib import Path

STAT = Path("/proc/stat")
EVERY = 0.5
"""Seconds between two looks."""
BUSY, QUIET = 0.3, 0.15
"""Cores that others keep busy: threads sleep from the first on, and spin again below the second, twice running."""
SPLIT = 2**18
"""Count of numbers that torch shares among several threads."""


def busy_seconds(cores: set[int]) -> float | None:
    """Return the processor time that these cores have worked since the system started; None where nothing tells."""
    try:
        lines = STAT.read_text().splitlines()
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None
    found = {fields[0]: fields[1:] for line in lines if (fields := line.split()) and fields[0].startswith("cpu")}
    rows = [found[f"cpu{core}"] for core in cores if f"cpu{core}" in found]
    # The fields are user, nice and system, then irq and softirq; idle and iowait are left out.
    return sum(int(row[place]) for row in rows for place in (0, 1, 2, 5, 6)) / ticks if rows else None


class Pool:
    """Threads of OpenMP that sleep until they are let go."""

    def __init__(self) -> None:
        self.leave, self.has_computed = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.run, name="sleeping pool", daemon=True)
        self.thread.start()

    def run(self) -> None:
        try:
            sys.modules["torch"].ones(SPLIT).add_(1)  # a thread that computes has a pool until it ends
        finally:
            self.has_computed.set()
        self.leave.wait()

    def let_go(self) -> None:
        self.leave.set()
        self.thread.join()


class Neighbours:
    """Looks from time to time at what other processes do on this process's cores."""

    def __init__(self) -> None:
        self.cores = os.sched_getaffinity(0)
        self.pool: Pool | None = None
        self.is_over = False
        self.lock = threading.Lock()
        self.quiet_looks = 0
        self.last = self.now()
        atexit.register(self.end)

    def now(self) -> tuple[float, float, float]:
        """Return the time, and the processor time of the cores and of this process, in seconds."""
        busy = busy_seconds(self.cores)
        return time.monotonic(), 0.0 if busy is None else busy, time.process_time()

    def look(self) -> None:
        """Have threads sleep or spin by what others did since the last look."""
        now = self.now()
        passed, busy, own = (after - before for after, before in zip(now, self.last, strict=True))
        self.last = now
        self.heed((busy - own) / passed if passed > 0 else 0.0)

    def heed(self, others: float) -> None:
        """Have threads sleep or spin beside others that keep so many cores busy."""
        self.quiet_looks = self.quiet_looks + 1 if others < QUIET else 0
        if others > BUSY and self.pool is None and torch_is_ready():
            with self.lock:
                self.pool = None if self.is_over else Pool()
        elif self.quiet_looks > 1 and self.pool is not None:
            self.pool.let_go()
            self.pool = None

    def end(self) -> None:
        """Wait until no thread of these is inside torch: a process that ended meanwhile would be aborted (SIGABRT)."""
        with self.lock:
            self.is_over, pool = True, self.pool
        if pool is not None:
            pool.has_computed.wait()

    def watch(self) -> None:
        while True:
            time.sleep(EVERY)
            self.look()


def torch_is_ready() -> bool:
    """Return whether torch is imported: an operation while another thread still imports it ends the process."""
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    return spec is not None and not getattr(spec, "_initializing", False)


def can_be_followed() -> bool:
    """Return whether this system tells what its cores do."""
    return hasattr(os, "sched_getaffinity") and busy_seconds(os.sched_getaffinity(0)) is not None


def follow() -> None:
    """Look at the neighbours for the rest of this process."""
    threading.Thread(target=Neighbours().watch, name="neighbours", daemon=True).start()
