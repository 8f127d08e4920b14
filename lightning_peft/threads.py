"""How torch's threads share the cores with other processes: decided before torch is imported.

OpenMP's threads wait for each other by spinning. Where another process wants a core, a thread that spins takes the time
of the one it waits for: with one busy neighbour on two cores a step took 25 times as long, and twice as long with
threads that sleep. What the user has set in the environment stands.
"""

import math
import os
from pathlib import Path

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which somebody has decided how threads wait."""
CGROUPS = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Cores this process may use: those of its affinity mask, or fewer where the container has a quota of time."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = quota_of_cores(CGROUPS)
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def quota_of_cores(folder: Path) -> float | None:
    """The cgroup's share of time in cores (v2's cpu.max, v1's cfs_quota); None where there is none."""
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
    """Have threads sleep while they wait, and be no more than the cores there are time for."""
    if not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = "0"
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    if "OMP_NUM_THREADS" not in os.environ and allowed is not None and available_cores() < allowed:
        os.environ["OMP_NUM_THREADS"] = str(available_cores())


def described() -> str:
    """The threads of this process in one line, for the start of a run."""
    threads = os.environ.get("OMP_NUM_THREADS", str(available_cores()))
    waits = ", ".join(f"{name}={os.environ[name]}" for name in WAITING if name in os.environ)
    return f"threads: {threads} of {os.cpu_count()} cores, {waits or 'waiting as OpenMP does by default'}"
