"""Triton's kernel for 4-bit codes beside bitsandbytes' three, under Triton's interpreter: no GPU takes part."""

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
from lightning_peft.kernels import codes
from lightning_peft.kernels.triton_codes import decode

device = torch.device("cpu")
torch.manual_seed(0)
for kind, twice, block_size in (("nf4", True, 64), ("nf4", False, 32), ("fp4", True, 128)):
    stored = codes.quantize(torch.randn(48, 512) * 0.02, kind, block_size, twice)
    tables = codes.dynamic_map(device), codes.ABSMAX_BLOCK, codes.levels(kind, device)
    for dtype in (torch.float32, torch.float16):
        found = decode(*stored, *tables, block_size, dtype)
        assert torch.equal(found, codes.dequantize(stored, kind, block_size, dtype)), (kind, twice, dtype)
    for shape, below in (((48, 16), False), ((48, 1000), False), ((16, 512), True), ((1, 512), True)):
        edge = torch.randn(shape)
        found = decode(*stored, *tables, block_size, torch.float32, edge, below)
        expected = codes.dequantize(stored, kind, block_size, torch.float32)
        assert torch.equal(found, torch.cat([expected, edge], 0 if below else 1)), (kind, shape)
    # The interpreter truncates to bf16 instead of rounding: one unit of the last place.
    found = decode(*stored, *tables, block_size, torch.bfloat16)
    expected = codes.dequantize(stored, kind, block_size, torch.bfloat16)
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
"""


def test_one_launch_gives_the_bits_of_three():
    words = [sys.executable, "-c", COMPARE]
    done = subprocess.run(words, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
