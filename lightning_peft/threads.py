"""The way torch's threads share the cores with other processes, decided before torch is imported.

OpenMP's threads wait for each other by spinning. Where another process wants a core, a thread that spins takes the time
of the one it waits for: with one busy neighbour on two cores a step took 25 times as long, and less than twice as long
with threads that sleep. On quiet cores threads that sleep cost a short step a fifth. So `neighbours.py` has them do
either; where it cannot tell, they sleep. The user's settings in the environment stand.
"""

import math
import os
from pathlib import Path

from lightning_peft import neighbours

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which a user may have decided how threads wait."""
CGROUPS = Path("/sys/fs/cgroup")
SPINS = 250_000
"""Rounds that a thread spins before it sleeps, nearly libgomp's own 300,000. With 20,000 a step took a tenth longer on
virtual cores, which are slow to wake.

This number in the environment was decided by a parent process by itself, and is decided anew.
"""


def available_cores() -> int:
    """Return the cores this process may use: those of its affinity mask, or fewer under a container's quota of time."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = quota_of_cores(CGROUPS)
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def quota_of_cores(folder: Path) -> float | None:
    """Return the cgroup's share of time in cores (v2's cpu.max, v1's cfs_quota); None where there is none."""
    try:
        quota, _, period = (folder / "cpu.max").read_text().partition(" ")
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        quota_v1 = int((folder / "cpu" / "cpu.cfs_quota_us").read_text())
        period_v1 = int((folder / "cpu" / "cpu.cfs_period_us").read_text())
        return None if quota_v1 <= 0 else quota_v1 / period_v1
    except (OSError, ValueError):
        return None


def set_up_threads() -> None:
    """Set no more threads than the cores there are time for, and let them sleep where others want those cores."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    has_all = "OMP_NUM_THREADS" not in os.environ and available_cores() == allowed
    if not any(os.environ.get(name, str(SPINS)) != str(SPINS) for name in WAITING):  # ours may be a parent's
        spins = has_all and allowed != 1 and quota_of_cores(CGROUPS) is None and neighbours.can_be_followed()
        os.environ["GOMP_SPINCOUNT"] = str(SPINS if spins else 0)
        if spins:
            neighbours.follow()
    if "OMP_NUM_THREADS" not in os.environ and allowed is not None and available_cores() < allowed:
        os.environ["OMP_NUM_THREADS"] = str(available_cores())


def described() -> str:
    """Return the threads of this process in one line, for the start of a run."""
    threads = os.environ.get("OMP_NUM_THREADS", str(available_cores()))
    waits = ", ".join(f"{name}={os.environ[name]}" for name in WAITING if name in os.environ)
    if waits == f"GOMP_SPINCOUNT={SPINS}":
        waits += " and asleep beside busy neighbours"
    return f"threads: {threads} of {os.cpu_count()} cores, {waits or 'waiting as OpenMP does by default'}"
