"""Training processes that take their steps in turn, so that a ratio compares neighbours in time.

Each side is a process of its own with a loop of its own. Before every step it asks for its turn and sleeps until it
has it; its clock runs from then to its next request, so whatever its loop does between two steps is in the time.
"""

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.memory import PeakMemory

PIPES = "BENCHMARK_PIPES"
"""Environment variable with the two file descriptors a training process talks over."""
ROOT = Path(__file__).parent.parent
WARM_UP_STEPS = 2
"""Steps at the start that no median counts: first calls allocate and compile, and the memory is watched."""
END_OF_OUTPUT = 3000
"""Characters of a failed process's output that are shown."""


class Turns:
    """The training process's end: call `begin` before each step and `end` after the last one.

    `synchronize` waits for the device, so that a step's time holds all of its work. `memory` is watched in the warm-up
    and read after each step that is timed; its peaks go to the summary.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None, memory: PeakMemory | None = None) -> None:
        self._synchronize, self._memory = synchronize, memory
        self._steps = 0
        read, write = os.environ[PIPES].split(",")
        self._go = os.fdopen(int(read), "r")
        self._reports = os.fdopen(int(write), "w")
        self._started: tuple[float, float] | None = None
        self.loss: float | None = None
        """Mean loss over the step's supervised tokens, set by the loop after its step."""
        self.tokens: int | None = None
        """Tokens of the step that are not padding, from a loop that knows them."""

    def begin(self) -> None:
        self._report_step()
        if self._memory is not None and self._steps == WARM_UP_STEPS:
            self._memory.stop_watching()
        self._steps += 1
        self._go.readline()
        self._started = time.perf_counter(), time.process_time()

    def end(self) -> None:
        self._report_step()
        self._send({} if self._memory is None else {"peak": self._memory.stop()})

    def _report_step(self) -> None:
        if self._started is None:
            self._send({"ready": True})
            return
        if self._synchronize is not None:
            self._synchronize()
        seconds, cpu_seconds = time.perf_counter() - self._started[0], time.process_time() - self._started[1]
        if self._memory is not None:
            self._memory.look()
        self._send({"seconds": seconds, "cpu_seconds": cpu_seconds, "loss": self.loss, "tokens": self.tokens})

    def _send(self, message: dict[str, Any]) -> None:
        self._reports.write(json.dumps(message) + "\n")
        self._reports.flush()


class Side:
    """The benchmark's end: starts a training process and gives it its turns."""

    def __init__(self, name: str, command: Sequence[str], log: Path, timeout: float):
        self.name, self.log = name, log
        read_go, go = os.pipe()
        reports, write_reports = os.pipe()
        self._go, self._reports = os.fdopen(go, "w"), os.fdopen(reports, "r")
        environment = os.environ | {
            PIPES: f"{read_go},{write_reports}",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        }
        started = time.perf_counter()
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, pass_fds=(read_go, write_reports)
            )
        os.close(read_go)
        os.close(write_reports)
        self._deadline = threading.Timer(timeout, self._process.kill)
        self._deadline.start()
        try:
            self._receive()
        except RuntimeError:
            self.kill()
            raise
        self.start_seconds = time.perf_counter() - started
        """Seconds from the start of the process to its first request for a turn: imports, data, model."""
        self.steps: list[dict[str, Any]] = []

    def step(self) -> None:
        self._go.write("\n")
        self._go.flush()
        self.steps.append(self._receive())

    def summary(self) -> dict[str, Any]:
        """Return what the process says at its end; call `summary` after the last step."""
        summary = self._receive()
        self._process.wait(timeout=300)
        return summary

    def kill(self) -> None:
        self._deadline.cancel()
        self._process.kill()
        self._process.wait()
        self._go.close()
        self._reports.close()

    def _receive(self) -> dict[str, Any]:
        line = self._reports.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended early:\n{self.log.read_text()[-END_OF_OUTPUT:]}")
        message: dict[str, Any] = json.loads(line)
        return message


def run_in_turns(
    commands: Mapping[str, Sequence[str]],
    steps: int,
    folder: Path,
    timeout: float = 1800,
    *,
    in_a_row: int = 1,
    pause: float = 0.0,
) -> dict[str, dict[str, Any]]:
    """Start each command, one after the other, and let them take `steps` steps in turn, so many in a row.

    Before each turn all of them wait for `pause` seconds.

    The result has by name: start_seconds, first_step_seconds (start included), seconds, cpu_seconds (the processor's
    own, of all threads), losses and tokens of every step, and the process's own summary. Raises RuntimeError, with the
    end of its output, when a process ends early; after `timeout` seconds it is made to.
    """
    sides: list[Side] = []
    try:
        for name, command in commands.items():
            sides.append(Side(name, command, folder / f"{name}.log", timeout))
        for begun in range(0, steps, in_a_row):
            for side in sides:
                time.sleep(pause)
                for _ in range(min(in_a_row, steps - begun)):
                    side.step()
        return {
            side.name: {
                "start_seconds": side.start_seconds,
                "first_step_seconds": side.start_seconds + side.steps[0]["seconds"],
                "seconds": [step["seconds"] for step in side.steps],
                "cpu_seconds": [step["cpu_seconds"] for step in side.steps],
                "losses": [step["loss"] for step in side.steps],
                "tokens": [step["tokens"] for step in side.steps],
            }
            | side.summary()
            for side in sides
        }
    finally:
        for side in sides:
            side.kill()
