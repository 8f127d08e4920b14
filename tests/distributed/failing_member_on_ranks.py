"""A group of two runs on every rank, of which the first fails: on all, on all but later, on rank zero alone."""

import json
import sys
import time
from pathlib import Path

import torch

from lightning_peft import distributed
from lightning_peft.training.together import Member, RunGroup


def found_with(fails_on: list[int], late: float = 0.0) -> list[str]:
    def fail(member: Member) -> float:
        if distributed.rank() in fails_on:
            time.sleep(late * distributed.rank())
            raise ValueError("a full disk")
        return float(distributed.reduce_sums(torch.tensor(1.0)))

    def go_on(member: Member) -> float:
        return float(distributed.reduce_sums(torch.tensor(10.0)))

    try:
        first, second = RunGroup(["first", "second"]).run([fail, go_on])
    except RuntimeError as error:
        return [str(error)]
    return [str(first.error or first.value), str(second.error or second.value)]


def main(file: str) -> None:
    distributed.connect("cpu")
    found = [found_with([0, 1]), found_with([0, 1], late=5.0)]
    started = time.monotonic()
    if distributed.rank() == 0:
        found.append(found_with([0]))
        Path(file).write_text(json.dumps([*found, time.monotonic() - started]))
    else:
        found_with([0])  # its end is that the other rank has left


if __name__ == "__main__":
    main(sys.argv[1])
