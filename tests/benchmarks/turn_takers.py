"""Processes for the tests of turns: one that trains nothing, one that fails before its second step."""

import sys

from benchmarks.turns import Turns

turns = Turns()
for step in range(3):
    if sys.argv[1] == "fails" and step == 1:
        raise SystemExit("no memory left")
    turns.begin()
    with open(sys.argv[2], "a") as order:
        order.write(sys.argv[1])
    turns.loss = float(step)
turns.end(peak={"anonymous_gib": 1.0})
