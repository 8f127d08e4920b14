"""The machine and the software that a figure was measured on."""

import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Any

import torch

from lightning_peft.checkpoint.lineage import installed_versions
from lightning_peft.training.precision import has_fast_bf16

RIVALS = ("peft", "trl", "unsloth", "liger-kernel")


def describe_machine() -> dict[str, Any]:
    """Return processor, cores, memory and device: enough to judge a figure, nothing that tells it from its twin."""
    machine: dict[str, Any] = {
        "cpu": _field(Path("/proc/cpuinfo"), "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(int(_field(Path("/proc/meminfo"), "MemTotal").split()[0]) / 2**20),
        "cpu_has_bf16": has_fast_bf16("cpu"),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        machine |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30),
            "cuda": torch.version.cuda,
        }
    return machine


def fastest_dtype(device: str) -> str:
    """Return bfloat16 where the device, cpu or cuda, multiplies it in hardware, else float32."""
    return "bfloat16" if has_fast_bf16(device) else "float32"


def versions() -> dict[str, str]:
    found = installed_versions()
    for package in RIVALS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command_line() -> str:
    """Return the command as it would be typed in the repository."""
    script = Path(sys.argv[0])
    return " ".join(["python", f"benchmarks/{script.name}", *sys.argv[1:]])


def _field(path: Path, name: str) -> str:
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "unknown"
