"""The memory a process asks of the kernel where freed memory is kept; in processes of their own, as it changes them."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

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


def kib_left(program: str, **way: bool) -> int:
    """Return what a program, which says which way it went, leaves taken."""
    command = [sys.executable, "-c", program.format(**way)]
    went, grown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert [went] == [str(wanted) for wanted in way.values()]
    return int(grown)


def test_threads_that_share_a_heap_take_what_others_freed() -> None:
    """Four threads, one after the other, need 100 MiB each."""
    assert kib_left(HEAPS, share=True) < 130 * 1024


HOLES = """
import ctypes, torch
from lightning_peft.training.host_memory import keep_freed_memory, use_tensor_heap
malloc = ctypes.CDLL(None).malloc
used = use_tensor_heap() if {own} else False
keep_freed_memory()
def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))
before = anonymous()
for step in range(12):
    kept = []
    for number in range(100):  # what a layer computes with is freed, what it keeps is not
        passing = torch.ones(2**16 + 64 * ((number * 7 + step) % 50))
        kept.append(torch.ones(2**16 + 64 * ((number * 5 + step) % 50)))
        for small in (24, 40, 56, 72):
            malloc(small)  # it lives on, as objects of C++ do
        del passing
    while kept:
        passing = torch.ones(2**16)
        kept.pop()
print(used, anonymous() - before)
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_tensors_take_the_holes_that_the_step_before_left() -> None:
    """Twelve steps need 26 MiB each, with small things that stay between."""
    assert kib_left(HOLES, own=True) < 30 * 1024


CHECKED = """
import gc, os, random, torch
from lightning_peft.training.host_memory import LARGEST_FROM_HEAP, SMALLEST_OF_HEAP, use_tensor_heap
before = torch.ones(2**16)
assert use_tensor_heap() and use_tensor_heap()
random.seed(0)
held = {}
for step in range(4000):
    if held and random.random() < 0.5:
        size, number, tensor = held.pop(random.choice(list(held)))
        assert tensor.numel() == size and bool((tensor == number).all())
    size = random.choice([1, SMALLEST_OF_HEAP, 2**18, random.randrange(2**19)])
    held[step] = size, step % 251, torch.full((size,), step % 251, dtype=torch.uint8)
    assert held[step][2].data_ptr() % 64 == 0
for size, number, tensor in held.values():
    assert bool((tensor == number).all())
x, w = torch.randn(256, 512).bfloat16(), torch.randn(512, 512).bfloat16()
assert torch.allclose((x @ w.t()).float(), x.float() @ w.float().t(), rtol=2e-2, atol=0.5)  # oneDNN's memory is of it
def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))
large = torch.ones(4 * LARGEST_FROM_HEAP, dtype=torch.uint8)
taken = anonymous()
assert bool((large == 1).all())
del large
assert taken - anonymous() > 100 * 1024  # what is large goes back to the system
large = torch.ones(LARGEST_FROM_HEAP + 1, dtype=torch.uint8)
grown = torch.ones(2**15, dtype=torch.uint8).resize_(2**20)
del before, held, large
if (child := os.fork()) == 0:
    os._exit(int(torch.ones(2**20).sum()) != 2**20)
assert os.waitpid(child, 0)[1] == 0
print("done")
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_tensors_of_the_heap_keep_what_is_written_to_them() -> None:
    done = subprocess.run([sys.executable, "-c", CHECKED], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr


LIMITED = """
import resource, torch
from lightning_peft.training.host_memory import use_tensor_heap
resource.setrlimit(resource.RLIMIT_{kind}, ({limit}, {limit}))
used = [use_tensor_heap(), use_tensor_heap()]
held = [torch.ones(2**18) for _ in range(100)], bytearray(2**28)
print(used)
"""


def heap_used_under(kind: str, limit: int) -> tuple[str, str]:
    """Return whether a process under a limit has the heap, asked twice, and what it says."""
    command = [sys.executable, "-c", LIMITED.format(kind=kind, limit=limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip(), done.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_heap_takes_no_more_of_a_limit_than_its_tensors_do() -> None:
    assert heap_used_under("DATA", 2**32) == ("[True, True]", "")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_limited_addresses_are_left_to_all_else_and_one_line_says_so() -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in (2**33, memory + 2**32):
        used, said = heap_used_under("AS", limit)
        assert used == "[False, False]"
        assert said.startswith("tensors lie in the C library's heap") and said.count("\n") == 1, said


FULL = """
import resource, threading, torch
from lightning_peft.training.host_memory import use_tensor_heap
torch.ones(2**18) @ torch.ones(2**18)
assert use_tensor_heap()
with open("/proc/self/status") as file:
    taken = next(int(line.split()[1]) for line in file if line.startswith("VmData")) * 1024
held, full, freed = [], threading.Semaphore(0), threading.Semaphore(0)
def free():
    while full.acquire():
        held.clear()
        freed.release()
threading.Thread(target=free, daemon=True).start()
resource.setrlimit(resource.RLIMIT_DATA, (taken + 2**28, taken + 2**28))
for _ in range(2):
    try:
        while True:
            held.append(torch.ones(2**20))
    except RuntimeError as error:
        print(len(held), "can't allocate memory" in str(error))
    full.release()
    freed.acquire()
print(bool((torch.ones(2**22) == 1).all()))
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_heap_that_gets_no_more_memory_says_so_once_and_goes_on() -> None:
    """As under `ulimit -d`, or where a system overcommits nothing and all is given out."""
    done = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, last = done.stdout.splitlines()
    assert [line.split()[1] for line in (first, second)] == ["True", "True"] and last == "True"
    assert int(second.split()[0]) >= int(first.split()[0]) >= 40  # of 4 MiB each
    assert done.stderr.startswith("tensors lie in the C library's heap from here on") and done.stderr.count("\n") == 1


SHARED = """
import os, sys, tempfile, threading, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, TensorDataset
from lightning_peft.training.host_memory import use_tensor_heap

def main():
    assert use_tensor_heap()
    rows = torch.arange(2**16).reshape(-1, 2**12).float()
    path = Path(tempfile.mkdtemp()) / "rows.safetensors"
    save_file({"rows": rows}, path)
    mapped = load_file(path)["rows"]
    assert torch.equal(mapped, rows)
    named = torch.from_file(str(path.with_suffix(".bin")), True, 2**16, dtype=torch.float32)
    named.copy_(rows.flatten())
    assert torch.equal(named, rows.flatten())
    for context in ("fork", "spawn"):
        loader = DataLoader(TensorDataset(rows), 4, num_workers=2, multiprocessing_context=context)
        assert torch.equal(torch.cat([batch for (batch,) in loader]), rows)
    given = [torch.full((2**14,), float(number)) for number in range(64)]
    def free(part):
        while part:
            assert len(set(part.pop().tolist())) == 1
    def make(number):
        for _ in range(50):
            own = torch.full((2**15,), float(number))
            assert bool((own == number).all())
    threads = [threading.Thread(target=free, args=(given[start::4],)) for start in range(4)]
    threads += [threading.Thread(target=make, args=(number,)) for number in range(4)]
    given.clear()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    own = torch.ones(2**16)
    own.untyped_storage().resize_(0)
    own.untyped_storage().resize_(own.nbytes)
    own.fill_(1)
    assert bool((own.share_memory_().add_(1) == 2).all())
    assert float(torch.from_numpy(torch.ones(2**14).numpy()).sum()) == 2**14
    print("done")

if __name__ == "__main__":
    main()
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_tensors_of_the_heap_go_to_workers_threads_and_files(tmp_path: Path) -> None:
    (tmp_path / "shared.py").write_text(SHARED)
    done = subprocess.run([sys.executable, tmp_path / "shared.py"], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr


def test_settings_of_the_user_keep_tensors_where_they_are_and_one_line_says_so() -> None:
    program = (
        "import logging; logging.basicConfig(level='INFO')\n"
        "from lightning_peft.training.host_memory import keep_freed_memory, share_heap, use_tensor_heap\n"
        "print(use_tensor_heap(), keep_freed_memory(), share_heap())"
    )
    environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "False False False\n"
    assert done.stderr.count("half as much again: MALLOC_TRIM_THRESHOLD_ is set, which is left as it is") == 1
