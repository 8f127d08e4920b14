"""The machine that a run gets: here, elsewhere by name, or a node of a cluster."""

import os
from dataclasses import dataclass
from typing import Any

import torch

from lightning_peft.cluster.job import ClusterConfig
from lightning_peft.training.precision import has_fast_bf16

GIB = 2**30
RESERVED = {"cpu": 0.5 * GIB, "cuda": 0.75 * GIB}
"""Memory left out by an estimate: the interpreter and its libraries; the CUDA context and gaps between allocations."""


@dataclass(frozen=True)
class Machine:
    """The part of one machine that a run may use."""

    accelerator: str
    """cpu or cuda."""
    gpus: int | None
    """CUDA devices; None for a machine that is not this one and did not say."""
    has_bf16: bool
    """True where the device multiplies bf16 in hardware."""
    is_here: bool = True
    """True where this process runs on it."""

    @classmethod
    def here(cls, trainer: dict[str, Any]) -> "Machine":
        """Return this machine with the accelerator of `trainer.accelerator`. Raises ValueError where it has none."""
        name = _named(trainer)
        if name == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"trainer.accelerator={trainer['accelerator']}: this machine has no CUDA device; "
                             "use cpu or auto, or dry_run=true to check the run")  # fmt: skip
        accelerator = name or ("cuda" if torch.cuda.is_available() else "cpu")
        gpus = torch.cuda.device_count() if accelerator == "cuda" else 0
        return cls(accelerator, gpus, has_fast_bf16(accelerator))

    @classmethod
    def planned(cls, trainer: dict[str, Any]) -> "Machine":
        """Return the machine of an estimate or dry run: a GPU named need not be here, and is taken to have bf16."""
        if _named(trainer) != "cuda" or torch.cuda.is_available():
            return cls.here(trainer)
        return cls("cuda", None, has_bf16=True, is_here=False)

    @classmethod
    def of_cluster(cls, trainer: dict[str, Any], cluster: ClusterConfig) -> "Machine":
        """Return a node that a cluster will give the run; whether it has GPUs may be up to a partition of SLURM."""
        return cls(_named(trainer) or "cuda", cluster.gpus_per_node or None, has_bf16=True, is_here=False)

    def memory(self, named_gib: float | None) -> float | None:
        """Return the bytes to use of `named_gib`, else of this machine, less `RESERVED`; None for a GPU not known."""
        if named_gib is not None:
            total: float | None = named_gib * GIB
        elif self.accelerator == "cpu":
            total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        else:
            total = float(torch.cuda.get_device_properties(0).total_memory) if self.is_here else None
        return None if total is None else total - RESERVED[self.accelerator]


def _named(trainer: dict[str, Any]) -> str | None:
    """Return cpu or cuda as `trainer.accelerator` names it; None for auto."""
    name = str(trainer.get("accelerator", "auto"))
    if name not in ("auto", "cpu", "gpu", "cuda"):
        raise ValueError(f"trainer.accelerator={name!r}: must be auto, cpu or gpu")
    return None if name == "auto" else "cpu" if name == "cpu" else "cuda"
