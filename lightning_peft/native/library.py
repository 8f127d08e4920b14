"""The kernels' shared library: compiled once for a machine, kept in the user's cache folder, loaded from there.

Named by its sources and flags, so that it is never out of date. The flags name instructions and not the machine's own
model: what one node of a cluster leaves in a shared home runs on every node that `library` lets it run on.
"""

import ctypes
import hashlib
import logging
import os
import shlex
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lightning_peft.user_cache import user_cache

logger = logging.getLogger(__name__)

LANES = 16
"""fp32 numbers of a vector, as vectors.h has it."""
FOLDER = Path(__file__).parent
HEADERS, SOURCES = ("vectors.h", "tiles.h"), ("attention.cpp", "linear.cpp", "cross_entropy.cpp")
FLAGS = (
    "-std=c++17 -O3 -fPIC -shared -fno-exceptions -fno-rtti -fopenmp "
    "-mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 "
    # OpenMP is left to be found in the process: torch's, whose threads are there already.
    "-nodefaultlibs -lc -lm"
).split()


@cache
def library() -> ctypes.CDLL | None:
    """The kernels; None on a processor without AVX-512 and bf16, and, with a logged line, where they do not compile."""
    if not torch.cpu._is_avx512_bf16_supported():
        return None
    try:
        return ctypes.CDLL(str(compiled()))
    except (OSError, RuntimeError) as error:
        logger.warning("attention, adapters and loss run without their compiled kernels, a fifth slower: %s", error)
        return None


def kernels() -> ctypes.CDLL:
    """`library()`, where it is known to be there."""
    loaded = library()
    assert loaded is not None, "no kernels on this machine"
    return loaded


def address(x: Tensor | None) -> ctypes.c_void_p:
    """Where a tensor's numbers begin, for a kernel; null of None."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def compiled() -> Path:
    """The library's file, made if it is not there. RuntimeError where the compiler fails, OSError where files do."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for name in (*HEADERS, *SOURCES):
        digest.update((FOLDER / name).read_bytes())
    path = user_cache() / "native" / f"{digest.hexdigest()[:16]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            compile_to(made)
            os.replace(made, path)  # several processes may be making it
        logger.info("kernels compiled in %.1f s, kept as %s", time.monotonic() - start, path)
    return path


def compile_to(path: Path) -> None:
    """Raises RuntimeError with the compiler's first line of complaint."""
    compiler = os.environ.get("CXX") or "g++"
    sources = [str(FOLDER / name) for name in SOURCES]
    try:
        done = subprocess.run(
            [*shlex.split(compiler), *sources, "-o", str(path), *FLAGS], capture_output=True, text=True
        )
    except FileNotFoundError:
        raise RuntimeError(f"no compiler {compiler} found; install g++, or name one in CXX") from None
    if done.returncode:
        raise RuntimeError(f"{compiler} failed: {(done.stderr.splitlines() or ['no output'])[0]}")
