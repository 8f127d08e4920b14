"""The kernels' shared libraries: each compiled once, kept in the user's cache folder, loaded from there.

A library is named by its sources, compiler and flags, so that it is never out of date. The flags name instructions and
not the machine's own model: what one node of a cluster leaves in a shared home, nodes of the same system can load.
"""

import ctypes
import hashlib
import logging
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_peft.user_cache import user_cache

logger = logging.getLogger(__name__)

LANES = 16
"""fp32 numbers of a vector, as vectors.h has it."""
Scratch = list[tuple[tuple[int, ...], torch.dtype]]
"""Shapes and dtypes of what an operator holds while it runs, beside its result."""
FOLDER = Path(__file__).parent
FLAGS = (
    "-std=c++17 -O3 -fPIC -shared -fno-exceptions -fno-rtti -fopenmp "
    # OpenMP is left to be found in the process: torch's, whose threads are there already.
    "-nodefaultlibs -lc -lm"
).split()


class Build(NamedTuple):
    """The parts that a shared library is made of."""

    sources: tuple[str, ...]
    headers: tuple[str, ...]
    instructions: tuple[str, ...]
    """Flags of the instructions that its processors have."""
    without: str
    """The work that goes on without the library, and what that costs."""
    runs_here: Callable[[], bool]
    """Return whether this machine can run it."""
    own_flags: tuple[str, ...] = ()
    """Flags behind those that all builds have."""


AVX512_BF16 = Build(
    ("attention.cpp", "linear.cpp", "cross_entropy.cpp", "few_rows_bf16.cpp", "decoding.cpp"),
    ("vectors.h", "tiles.h", "rows.h"),
    ("-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16"),
    "attention, adapters, loss and answers run without their compiled kernels, a quarter slower or more",
    lambda: bool(torch.cpu._is_avx512_bf16_supported()),
)
AMX = Build(
    ("few_rows_amx.cpp",),
    AVX512_BF16.headers,
    (*AVX512_BF16.instructions, "-mamx-tile", "-mamx-bf16"),
    "answers in bf16 are written without the tiles of AMX, at half the speed in batches",
    # The system gives tiles to those who ask for them.
    lambda: bool(torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()),
)
AVX2 = Build(
    ("few_rows.cpp",),
    (),
    ("-mfma", "-mavx2"),
    "answers in fp32 are written without their compiled kernels, at half the speed in batches",
    lambda: bool(torch.cpu._is_avx2_supported()),
)

_switched_off = False


def library(build: Build = AVX512_BF16) -> ctypes.CDLL | None:
    """Return the kernels of a build.

    The result is None on a processor without its instructions, and, with a logged line, where they do not compile.
    """
    return None if _switched_off else _load(build)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Behave like a machine without the kernels, inside the block."""
    global _switched_off
    before, _switched_off = _switched_off, True
    try:
        yield
    finally:
        _switched_off = before


@cache
def _load(build: Build) -> ctypes.CDLL | None:
    if not build.runs_here():
        return None
    try:
        return ctypes.CDLL(str(compiled(build)))
    except (OSError, RuntimeError, ValueError) as error:
        logger.warning("%s: %s", build.without, error)
        return None


def kernels(build: Build = AVX512_BF16) -> ctypes.CDLL:
    """Return `library(build)`, where it is known to be there."""
    loaded = library(build)
    assert loaded is not None, "no kernels on this machine"
    return loaded


def address(x: Tensor | None) -> ctypes.c_void_p:
    """Return where a tensor's numbers begin, for a kernel; null for None."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def compiled(build: Build = AVX512_BF16) -> Path:
    """Return a library's file, made if it is not there.

    Raises RuntimeError where the compiler fails, OSError where files do.
    """
    digest = hashlib.sha256(" ".join((compiler(), *FLAGS, *build.instructions, *build.own_flags)).encode())
    for name in (*build.headers, *build.sources):
        digest.update((FOLDER / name).read_bytes())
    path = user_cache() / "native" / f"{digest.hexdigest()[:16]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            compile_to(made, build)
            ctypes.CDLL(str(made))  # a library that does not load here is not kept
            os.replace(made, path)  # several processes may be making it
        logger.info("kernels compiled in %.1f s, kept as %s", time.monotonic() - start, path)
    return path


def compiler() -> str:
    """Return the C++ compiler's words, as a shell has them."""
    return os.environ.get("CXX") or "g++"


def compile_to(path: Path, build: Build) -> None:
    """Compile to a file. Raises RuntimeError with the compiler's first complaint, ValueError for words without end."""
    sources = (str(FOLDER / name) for name in build.sources)
    command = [*shlex.split(compiler()), *sources, "-o", str(path), *build.instructions, *FLAGS, *build.own_flags]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except FileNotFoundError:
        raise RuntimeError(f"no compiler {compiler()} found; install g++, or name one in CXX") from None
    if done.returncode:
        raise RuntimeError(f"{compiler()} failed: {(done.stderr.splitlines() or ['no output'])[0]}")
