"""The partitions of a SLURM cluster, as sinfo tells them: the GPUs, memory and time that a job can have there."""

import re
from dataclasses import dataclass

from lightning_peft.cluster.slurm import SLURM_COMMANDS

GPU_GIB = {
    "GB200": 186, "B200": 180, "H200": 141, "H100 NVL": 94, "H100": 80, "H800": 80, "H20": 96, "GH200": 96,
    "A100 80": 80, "A100": 40, "A800": 80, "A40": 48, "A30": 24, "A16": 16, "A10G": 24, "A10": 24, "L40S": 48,
    "L40": 48, "L4": 24, "V100 32": 32, "V100": 16, "P100": 16, "T4": 16, "RTX 6000 ADA": 48, "RTX A6000": 48,
    "A6000": 48, "RTX 5090": 32, "RTX 4090": 24, "RTX 3090": 24,
}  # fmt: skip
"""Memory by a part of a GPU's name, the smallest of those sold under it; the longest part counts."""


@dataclass(frozen=True)
class Partition:
    """Nodes of one kind in a partition."""

    name: str
    nodes: int
    cpus: int
    memory_gib: float
    """Memory of a node."""
    gpu: str | None
    """SLURM's name of the kind of GPU; "" where SLURM gives none, None without GPUs."""
    gpus: int
    minutes: int | None
    """Longest job; None for no limit."""

    @property
    def gpu_gib(self) -> int | None:
        """Return the memory of one of its GPUs; None where its name does not say."""
        return gpu_gib(self.gpu) if self.gpu else None


def find_partitions() -> list[Partition]:
    """Return what sinfo says, a row for each kind of node. Raises ClusterError where there is no SLURM."""
    lines = SLURM_COMMANDS.run("sinfo", "--noheader", "--exact", "--format=%P|%D|%c|%m|%G|%l").splitlines()
    return [parsed(line) for line in lines if line.strip()]


def parsed(line: str) -> Partition:
    name, nodes, cpus, memory, gres, limit = (part.strip() for part in line.split("|"))
    gpu, gpus = gpus_of(gres)
    return Partition(
        name.rstrip("*"), int(nodes), int(re.sub(r"\D", "", cpus)), int(re.sub(r"\D", "", memory)) / 1024, gpu, gpus,
        minutes_of(limit),
    )  # fmt: skip


def gpus_of(gres: str) -> tuple[str | None, int]:
    """Return the kind and number of GPUs in SLURM's words, as gpu:a100:4(S:0-1) or gpu:2."""
    for entry in re.sub(r"\([^)]*\)", "", gres).split(","):
        kind, _, rest = entry.strip().partition(":")
        if kind != "gpu":
            continue
        *name, count = rest.split(":") if rest else ["1"]
        return (name[0] if name else ""), int(count)
    return None, 0


def minutes_of(limit: str) -> int | None:
    """Return the minutes of days-hours:minutes:seconds, or a shorter form of it; None for infinite."""
    if limit in ("infinite", "n/a", "UNLIMITED"):
        return None
    days, dash, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:  # after days, hours come first
        hours, minutes, *_ = [*parts, 0, 0]
        return int(days) * 1440 + hours * 60 + minutes
    if len(parts) == 3:
        return parts[0] * 60 + parts[1]
    return parts[0]  # minutes, or minutes:seconds


def gpu_gib(name: str) -> int | None:
    """Return the memory of a GPU by its name, as a100, A100-SXM4-80GB, nvidia_h100_80gb or a100_3g.20gb; None where not
    known.

    A slice of one (MIG) says it itself. A number that goes on is another card: an RTX A4000 is no A40.
    """
    if (slice_ := re.search(r"\d+g\.(\d+)gb", name.lower())) is not None:
        return int(slice_[1])
    plain = re.sub(r"[_-]+", " ", name).upper()
    parts = [part for part in GPU_GIB if all(re.search(rf"(?<![A-Z0-9]){w}(?!\d)", plain) for w in part.split())]
    return GPU_GIB[max(parts, key=len)] if parts else None
