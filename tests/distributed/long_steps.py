"""Started on every rank, rank zero works longer than ranks may be silent; each rank writes what it saw into a file."""

import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from lightning_peft import distributed
from lightning_peft.training import teacher_store


def steps(end: Exception | None = None) -> Iterator[None]:
    for _ in range(12):
        time.sleep(0.5)
        yield
    if end is not None:
        raise end


distributed.TIMEOUT = timedelta(seconds=3)
distributed.SECONDS_BETWEEN_WORDS = 0.4
teacher_store.SECONDS_OF_PATIENCE = 0.5
distributed.connect("cpu")
shared = Path(sys.argv[1])
found = ["done"]
started = time.monotonic()
distributed.on_rank_zero_in_steps(steps)
found.append("late" if time.monotonic() - started > 5 else "early")
for name in (lambda: distributed.on_rank_zero_in_steps(lambda: steps(ValueError("wrong at the end"))),
             lambda: teacher_store.check_shared(shared / "all", "all"),
             lambda: teacher_store.check_shared(shared / str(distributed.rank()), "own")):  # fmt: skip
    try:
        name()
        found.append("fine")
    except ValueError as error:
        found.append(str(error).partition(";")[0])
(shared / f"rank{distributed.rank()}.txt").write_text("|".join(found))
distributed.disconnect()
