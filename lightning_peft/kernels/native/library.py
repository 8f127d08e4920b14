"""The kernels' shared library: compiled once, kept in the user's cache folder, loaded from there.

Named by its sources, compiler and flags, so that it is never out of date. The flags name instructions and not the
machine's own model: what one node of a cluster leaves in a shared home, nodes of the same system can load.
"""

import ctypes
import hashlib
import logging
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lightning_peft.user_cache import user_cache

logger = logging.getLogger(__name__)

LANES = 16
"""fp32 numbers of a vector, as vectors.h has it."""
Scratch = list[tuple[tuple[int, ...], torch.dtype]]
"""Shapes and dtypes of what an operator holds while it runs, beside its result."""
FOLDER = Path(__file__).parent
HEADERS, SOURCES = ("vectors.h", "tiles.h"), ("attention.cpp", "linear.cpp", "cross_entropy.cpp")
FLAGS = (
    "-std=c++17 -O3 -fPIC -shared -fno-exceptions -fno-rtti -fopenmp "
    "-mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 "
    # OpenMP is left to be found in the process: torch's, whose threads are there already.
    "-nodefaultlibs -lc -lm"
).split()


_switched_off = False


def library() -> ctypes.CDLL | None:
    """Return the kernels.

    None on a processor without AVX-512 and bf16, and, with a logged line, where they do not compile.
    """
    return None if _switched_off else _load()


@contextmanager
def without_kernels() -> Iterator[None]:
    """Inside, behave like a machine without the kernels."""
    global _switched_off
    before, _switched_off = _switched_off, True
    try:
        yield
    finally:
        _switched_off = before


@cache
def _load() -> ctypes.CDLL | None:
    if not torch.cpu._is_avx512_bf16_supported():
        return None
    try:
        return ctypes.CDLL(str(compiled()))
    except (OSError, RuntimeError, ValueError) as error:
        logger.warning(
            "attention, adapters and loss run without their compiled kernels, a quarter slower or more: %s", error
        )
        return None


def kernels() -> ctypes.CDLL:
    """Return `library()`, where it is known to be there."""
    loaded = library()
    assert loaded is not None, "no kernels on this machine"
    return loaded


def address(x: Tensor | None) -> ctypes.c_void_p:
    """Return where a tensor's numbers begin, for a kernel; null of None."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def compiled() -> Path:
    """Return the library's file, made if it is not there.

    RuntimeError where the compiler fails, OSError where files do.
    """
    digest = hashlib.sha256(" ".join((compiler(), *FLAGS)).encode())
    for name in (*HEADERS, *SOURCES):
        digest.update((FOLDER / name).read_bytes())
    path = user_cache() / "native" / f"{digest.hexdigest()[:16]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            compile_to(made)
            ctypes.CDLL(str(made))  # what does not load here is not kept
            os.replace(made, path)  # several processes may be making it
        logger.info("kernels compiled in %.1f s, kept as %s", time.monotonic() - start, path)
    return path


def compiler() -> str:
    """Return the C++ compiler's words, as a shell has them."""
    return os.environ.get("CXX") or "g++"


def compile_to(path: Path) -> None:
    """Raises RuntimeError with the compiler's first line of complaint, ValueError where its words have no end."""
    command = [*shlex.split(compiler()), *(str(FOLDER / name) for name in SOURCES), "-o", str(path), *FLAGS]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except FileNotFoundError:
        raise RuntimeError(f"no compiler {compiler()} found; install g++, or name one in CXX") from None
    if done.returncode:
        raise RuntimeError(f"{compiler()} failed: {(done.stderr.splitlines() or ['no output'])[0]}")
