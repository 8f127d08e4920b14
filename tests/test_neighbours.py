"""Threads sleep beside busy neighbours and spin without them."""

import os
import subprocess
import sys
import threading
import time

import pytest

from lightning_peft.neighbours import BUSY, Neighbours, busy_seconds, can_be_followed

pytestmark = pytest.mark.skipif(not can_be_followed(), reason="this system does not tell what its cores do")

WAITS = """
import time
import torch
from lightning_peft.neighbours import SPLIT, Neighbours

def seconds_spun() -> float:
    torch.ones(SPLIT).add_(1)
    before = time.process_time()
    time.sleep(0.8)
    return time.process_time() - before

torch.set_num_threads(2)
neighbours, spun = Neighbours(), []
for others in (0.0, 1.0, 1.0, 0.0, 0.0):
    neighbours.heed(others)
    seconds_spun()
    spun.append(seconds_spun())
print(*spun)
"""

IMPORTS = """
import threading
import time
from lightning_peft.neighbours import Neighbours

neighbours = Neighbours()
ready = threading.Event()

def heeds() -> None:
    while neighbours.pool is None:
        neighbours.heed(1.0)
        time.sleep(0.001)
    ready.set()

threading.Thread(target=heeds, daemon=True).start()
import torch
print(ready.wait(60))
"""


def test_the_pool_waits_for_the_import_of_torch() -> None:
    """An operation beside the import was a segmentation fault, at a start beside busy neighbours."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


@pytest.mark.skipif(len(os.sched_getaffinity(0)) != 2, reason="as many threads as cores are two here")
def test_threads_spin_without_busy_neighbours_only() -> None:
    """The second thread spins on as long as it may, which is for ever here, unless the pool has it sleep."""
    environment = os.environ | {"GOMP_SPINCOUNT": "100000000000", "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", WAITS], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    quiet, busy, still_busy, quiet_once, quiet_again = map(float, done.stdout.split())
    assert max(busy, still_busy, quiet_once) < 0.05
    assert min(quiet, quiet_again) > 0.1  # other tests want the cores, too


def test_a_busy_neighbour_is_seen() -> None:
    cores = os.sched_getaffinity(0)
    before = busy_seconds(cores)
    neighbours = Neighbours()
    seen: list[float] = []
    neighbours.heed = seen.append  # type: ignore[method-assign]
    with subprocess.Popen([sys.executable, "-c", "while True: sum(range(100000))"]) as process:
        time.sleep(1.5)
        neighbours.look()
        process.kill()
    assert seen[0] > BUSY
    after = busy_seconds(cores)
    assert before is not None and after is not None and after - before > 0.5


def test_a_pool_ends_with_its_neighbours() -> None:
    import torch

    assert torch is sys.modules["torch"]
    neighbours = Neighbours()
    names = [thread.name for thread in threading.enumerate()]
    neighbours.heed(1.0)
    assert [thread.name for thread in threading.enumerate()].count("sleeping pool") == 1
    neighbours.heed(1.0)
    assert [thread.name for thread in threading.enumerate()].count("sleeping pool") == 1
    neighbours.heed(0.2)  # between the two limits nothing changes
    neighbours.heed(0.0)
    assert neighbours.pool is not None
    neighbours.heed(0.0)
    assert neighbours.pool is None and [thread.name for thread in threading.enumerate()] == names
