"""The memory a process asks of the kernel where freed memory is kept; in processes of their own, as it changes them."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's mallopt")

FAULTS = """
import resource, torch
from lightning_peft.training.host_memory import keep_freed_memory
kept = keep_freed_memory() if {keep} else False
def step():
    tensors = [torch.ones(2**20) for _ in range(64)]
for _ in range(3): step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3): step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(keep: bool, **environment: str) -> tuple[bool, int]:
    command = [sys.executable, "-c", FAULTS.format(keep=keep)]
    printed = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True).stdout
    kept, faults = printed.split()
    return kept == "True", int(faults)


def test_steps_reuse_what_the_ones_before_freed() -> None:
    kept, faults = page_faults(keep=True)
    # glibc by itself returns memory depending on what lies at the end of the heap; so told, it always does.
    _, faults_otherwise = page_faults(keep=False, MALLOC_MMAP_THRESHOLD_="131072")
    assert kept and faults < faults_otherwise / 20 and faults_otherwise > 500


def test_settings_of_the_user_stay() -> None:
    kept, _ = page_faults(keep=True, MALLOC_TRIM_THRESHOLD_="65536")
    assert not kept
