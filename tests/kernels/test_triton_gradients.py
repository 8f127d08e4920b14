"""The kernels that read an output's gradient once, under Triton's interpreter and as code for GPUs: none takes part."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="no triton (pip install triton)"),
]

# It runs in a process of its own: the interpreter is chosen before the kernels are defined.
COMPARE = """
import torch
from lightning_peft.kernels import inside_product, shared_input
from lightning_peft.kernels.triton_gradients import add_up, read_once

torch.library.impl("lightning_peft::read_once", "CPU")(
    lambda grad, factor, inner, scaling, *, inner_parts, B_parts:
    read_once(grad, factor, inner, scaling, inner_parts, B_parts)
)
torch.library.impl("lightning_peft::add_up", "CPU")(
    lambda inner_parts, B_parts, *, grad_inner: add_up(inner_parts, B_parts, grad_inner)
)
shared_input.reads_once = lambda grads, ranks: True
torch.manual_seed(0)
# Widths and rows that no block divides, ranks that differ, one layer by itself.
for widths, ranks, rows in (((1000, 96, 96), (4, 7, 16), 700), ((1536,), (32,), 513), ((600, 600), (8, 8), 256)):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
        grads = [torch.randn(rows, width).to(dtype) for width in widths]
        factors = [torch.randn(width, rank).to(dtype) for width, rank in zip(widths, ranks)]
        inner = torch.randn(rows, sum(ranks)).to(dtype)
        made, sums = torch.ops.lightning_peft.output_gradients(grads, factors, inner, 0.5)
        expected = torch.cat([0.5 * grad.double() @ B.double() for grad, B in zip(grads, factors)], 1)
        torch.testing.assert_close(made.double(), expected, rtol=tolerance, atol=20 * tolerance)
        for grad, own, found in zip(grads, inner.split(ranks, 1), sums, strict=True):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), grad.double().t() @ own.double(), rtol=1e-4, atol=1e-3)
        # The same in wider rows, and with factors beside weights: to the bit.
        for place, grad in enumerate(grads):
            size, room = grad.shape[1], sum(ranks) + 3
            wide = torch.zeros(rows, size + room).to(dtype)
            wide[:, :size] = grad
            beside = [torch.zeros(len(B), B.shape[1] + 5).to(dtype)[:, 5:].copy_(B) for B in factors]
            others = [*grads[:place], *grads[place + 1 :]]
            at_edge = torch.ops.lightning_peft.fill_gradient_edge(wide, others, place, beside, inner, 0.5)
            assert torch.equal(at_edge, torch.cat([found.flatten() for found in sums]))
            assert torch.equal(wide, torch.cat([grad, made, torch.zeros(rows, 3).to(dtype)], 1))
"""


def test_parts_add_up_to_the_products():
    words = [sys.executable, "-c", COMPARE]
    done = subprocess.run(words, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("architecture", [80, 86, 89, 90, 100])
@pytest.mark.parametrize(("columns", "rank"), [(512, 16), (256, 32), (16, 16)])
def test_sums_stay_in_the_registers_of_a_gpu(architecture, columns, rank, tmp_path):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lightning_peft.kernels.triton_gradients import ROWS, _read_once

    constants = {"COLUMNS": columns, "ROWS": ROWS, "RANK": rank}
    tensors = dict.fromkeys(("grad", "B", "inner"), "*bf16") | dict.fromkeys(("inner_parts", "B_parts"), "*fp32")
    names = _read_once.arg_names
    types = dict.fromkeys(names, "i32") | tensors | {"scaling": "fp32"} | dict.fromkeys(constants, "constexpr")
    aligned = [
        place for place, name in enumerate(names) if types[name] != "constexpr" and name not in ("scaling", "rank")
    ]
    source = ASTSource(
        _read_once, signature=types, constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(place,): [["tt.divisibility", 16]] for place in aligned},
    )  # fmt: skip
    options = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    assert made.metadata.shared <= 99 * 1024  # a program may have so much on the smallest of them
    (tmp_path / "code").write_bytes(made.asm["cubin"])
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    words = [os.path.join(tools, "cuobjdump"), "-res-usage", str(tmp_path / "code")]
    used = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "STACK:0 " in used, used
