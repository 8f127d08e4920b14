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


HEAPS = """
import threading, torch
from lightning_peft.training.host_memory import keep_freed_memory, share_heap
shared = share_heap() if {share} else False
keep_freed_memory()
def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))
def work():
    tensors = [torch.ones(2**18) for _ in range(100)]
before = anonymous()
for _ in range(4):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
print(shared, anonymous() - before)
"""


def kib_of_threads(share: bool) -> int:
    """Return what four threads, one after the other, leave taken that each need 100 MiB."""
    command = [sys.executable, "-c", HEAPS.format(share=share)]
    shared, grown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert shared == str(share)
    return int(grown)


def test_threads_that_share_a_heap_take_what_others_freed() -> None:
    assert kib_of_threads(share=True) < 130 * 1024
