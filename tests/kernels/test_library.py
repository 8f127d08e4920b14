"""The kernels' library: compiled once, and the words where it cannot be."""

import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_peft.kernels.native import library as native_library
from lightning_peft.kernels.native.library import AMX, AVX2, AVX512_BF16, Build, compiled, library
from lightning_peft.training.host_memory import TENSOR_HEAP

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture(params=[AVX512_BF16, AVX2, AMX, TENSOR_HEAP], ids=["avx512_bf16", "avx2", "amx", "tensor_heap"])
def build(request: pytest.FixtureRequest) -> Build:
    if not request.param.runs_here():
        pytest.skip("not for this machine")
    return request.param


@pytest.fixture(autouse=True)
def as_in_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native_library._load.cache_clear()
    yield
    native_library._load.cache_clear()


def test_it_is_compiled_once_and_says_so(build: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lightning_peft"):
        assert library(build) is not None
        native_library._load.cache_clear()
        assert library(build) is not None
    (made,) = (tmp_path / "lightning_peft" / "native").iterdir()
    (record,) = caplog.records
    assert record.getMessage().startswith("kernels compiled in ") and str(made) in record.getMessage()


def test_other_sources_or_flags_are_another_file(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiled(build)
    monkeypatch.setattr(native_library, "FLAGS", [*native_library.FLAGS, "-g0"])
    assert compiled(build) != first


@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        ("no-such-compiler", "no compiler no-such-compiler found; install g++, or name one in CXX"),
        ("false", "false failed: no output"),
        ("g++ '", "No closing quotation"),
        ("g++ --no-such-option", "g++ --no-such-option failed: "),
    ],
)
def test_without_a_compiler_one_line_says_what_runs_instead(
    build: Build, compiler: str, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert library(build) is None and library(build) is None
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{build.without}: {said}")


def test_what_does_not_load_is_not_kept(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native_library, "FLAGS", [*native_library.FLAGS, "-include", str(tmp_path / "x.h")])
    (tmp_path / "x.h").write_text('extern "C" int nowhere(); namespace { int there = nowhere(); }')
    assert library(build) is None and "nowhere" in caplog.text
    assert list((tmp_path / "lightning_peft" / "native").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    occupied = tmp_path / "a file"
    occupied.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(occupied))
    assert library(build) is None
    assert str(occupied) in caplog.text


@pytest.mark.skipif(not AVX512_BF16.runs_here(), reason="no processor with AVX-512 and bf16 instructions")
def test_threads_are_those_of_torch(tmp_path: Path) -> None:
    """A second OpenMP beside torch's would have the two compete for the cores."""
    program = """
import os, torch
from lightning_peft.kernels.attention.operator import sample_attention
from lightning_peft.kernels.native.library import library
assert library() is not None
torch.set_num_threads(3)
x = torch.randn(1, 6, 64, 16).bfloat16()
torch.randn(2000, 2000).exp()
before = len(os.listdir("/proc/self/task"))
sample_attention(x, x, x, torch.tensor([0, 32, 64], dtype=torch.int32), 0.25, None)
assert len(os.listdir("/proc/self/task")) == before
print(len({line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
