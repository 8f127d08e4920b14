"""A CUDA device in name only, in this process, so that fake tensors on cuda:0 can go through autograd.

Import it before anything else of torch: `python -c "import benchmarks.fake_cuda"` says whether it can be built here.
"""

import ctypes
import importlib.util
import subprocess
import sys
import tempfile
import types
from hashlib import sha256
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_cuda.cpp")


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def built() -> Path:
    """Compile the device, once for these sources and this torch; raises CalledProcessError where that fails."""
    torch = torch_folder()
    key = sha256(SOURCE.read_bytes() + (torch / "version.py").read_bytes()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"fake_cuda_{key}.so"
    if path.exists():
        return path
    include = torch / "include"
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / "device.so"
        words: list[str | Path] = ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", SOURCE, "-o", made, f"-I{include}"]
        words += [f"-I{include / 'torch/csrc/api/include'}", f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
        subprocess.run([*words, f"-Wl,-rpath,{torch / 'lib'}"], check=True, capture_output=True)
        made.rename(path)
    return path


def load() -> None:
    """Load the device before torch, whose libraries it needs, and let torch see one Hopper GPU."""
    assert "torch" not in sys.modules, "the device comes before torch"
    library = torch_folder() / "lib"
    openmp = [path for path in sorted(library.iterdir()) if "gomp" in path.name]
    for path in (*openmp, library / "libc10.so", library / "libtorch_cpu.so", built()):
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    import torch

    hopper = types.SimpleNamespace(major=9, minor=0, name="NVIDIA H100 80GB HBM3", multi_processor_count=132)
    torch.cuda.get_device_properties = lambda device=None: hopper  # type: ignore[assignment, return-value]
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    torch.cuda.default_generators = (torch.default_generator,)


load()
