"""The kernel of row norms, under Triton's interpreter and as code for GPUs: none takes part."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="no triton (pip install triton)"),
]

# It runs in a process of its own: the interpreter is chosen before the kernel is defined.
COMPARE = """
import torch
from lightning_peft.kernels.triton_norms import row_norms

torch.manual_seed(0)
# Rows, columns and ranks that no tile divides; a weight that lies transposed, as an embedding's does.
for rows, width, rank in ((96, 256, 16), (37, 300, 5), (1, 1, 1), (64, 129, 33)):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for transposed in (False, True):
            weight = (torch.randn(width, rows).t() if transposed else torch.randn(rows, width)).to(dtype)
            A, B = torch.randn(rank, width), torch.randn(rows, rank)
            found = row_norms(weight, A, B, 0.7)
            expected = torch.linalg.norm(weight.double() + 0.7 * B.double() @ A.double(), dim=1)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
zeros = row_norms(torch.zeros(3, 8), torch.randn(2, 8), torch.zeros(3, 2), 1.0)
assert torch.isfinite(1 / zeros).all()
"""


def test_norms_are_those_of_the_sum():
    words = [sys.executable, "-c", COMPARE]
    done = subprocess.run(words, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("architecture", [80, 86, 89, 90, 100])
@pytest.mark.parametrize("weight", ["*bf16", "*fp32"])
def test_tiles_stay_in_the_registers_of_a_gpu(architecture, weight, tmp_path):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lightning_peft.kernels.triton_norms import COLUMNS, RANK, ROWS, _row_norms

    constants = {"ROWS": ROWS, "COLUMNS": COLUMNS, "RANK": RANK}
    names = _row_norms.arg_names
    types = dict.fromkeys(names, "i32") | dict.fromkeys(("A", "B", "norms"), "*fp32") | {"weight": weight}
    types |= dict.fromkeys(("scaling", "least"), "fp32") | dict.fromkeys(constants, "constexpr")
    # A step of 1 between columns is a constant to Triton.
    constants |= {"column_stride": 1}
    types["column_stride"] = "constexpr"
    aligned = [names.index(name) for name in ("weight", "A", "B", "norms", "width", "row_stride")]
    source = ASTSource(
        _row_norms, signature=types, constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(place,): [["tt.divisibility", 16]] for place in aligned},
    )  # fmt: skip
    options = {"num_warps": 4, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    assert made.metadata.shared <= 99 * 1024  # a program may have so much on the smallest of them
    (tmp_path / "code").write_bytes(made.asm["cubin"])
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    words = [os.path.join(tools, "cuobjdump"), "-res-usage", str(tmp_path / "code")]
    used = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "STACK:0 " in used, used
