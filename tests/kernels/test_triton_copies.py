"""Triton's kernel that copies many matrices at once, under Triton's interpreter: no GPU takes part."""

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
from lightning_peft.kernels.triton_copies import copy_matrices

torch.manual_seed(0)
shapes = (16, 1000), (700, 16), (1, 1), (5, 3)  # of several programs, and of less than one
sources = [torch.randn(shape) for shape in shapes]
whole = [torch.zeros(rows + 2, width + 7, dtype=torch.float16) for rows, width in shapes]
places = [own[1:-1, 3:-4] for own in whole]
for factor in (1, 2):  # a second time what the sources are then
    copy_matrices(sources, places)
    for own, source, (rows, width) in zip(whole, sources, shapes):
        expected = torch.zeros(rows + 2, width + 7, dtype=torch.float16)
        expected[1:-1, 3:-4] = source
        assert torch.equal(own, expected)
    for source in sources:
        source.mul_(2)

sources = [torch.randn(40, 3), torch.randn(4, 500), torch.randn(2, 2).half()]  # a layer may be kept in fp32
into = [torch.zeros(40, 6, dtype=torch.float16)[:, :3], torch.zeros(4, 500), torch.zeros(2, 2)]
copy_matrices(sources, into)
for source, place in zip(sources, into):
    assert torch.equal(source.to(place.dtype), place)
"""


def test_matrices_are_cast_into_their_places():
    words = [sys.executable, "-c", COMPARE]
    done = subprocess.run(words, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
