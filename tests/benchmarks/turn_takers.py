"""Processes for the tests of turns: one that trains nothing but takes memory, one that fails before its second step."""

import sys

import torch

from benchmarks.memory import PeakMemory
from benchmarks.turns import Turns

turns = Turns(memory=PeakMemory())
for step in range(3):
    if sys.argv[1] == "fails" and step == 1:
        raise SystemExit("no memory left")
    turns.begin()
    with open(sys.argv[2], "a") as order:
        order.write(sys.argv[1])
    turns.loss = float(step)
    held = torch.ones((step + 1) * 8 * 2**20)  # the last step holds most, 96 MiB
turns.end()
