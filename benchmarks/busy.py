"""The cost of a training step beside other processes that want the same cores: 0, 1 and 2 of them.

    python benchmarks/busy.py                        # SmolLM2-135M's shape, rows of 512 tokens; needs a quiet machine
    python benchmarks/busy.py --part quiet

beside: one `train` whose steps have 0, 1 and 2 busy processes beside them in turn, so that each ratio compares
neighbours in time. quiet: `train` as it is and one whose threads spin as OpenMP's do by default, a few steps of each
in turn with a pause between, for two that took single steps in turn would be each other's neighbours. Writes
benchmarks/results/busy.json; exit status 1 where a median is above its bar: MOST of quiet, MOST_OF_SPINNING of a quiet
step that spins.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.ours import train_command
from benchmarks.results import FOLDER, Results
from benchmarks.shapes import SHAPES, write_shape
from benchmarks.turns import END_OF_OUTPUT, ROOT, WARM_UP_STEPS, run_in_turns
from benchmarks.workloads import Workload
from lightning_peft.neighbours import EVERY
from lightning_peft.threads import WAITING

COUNTS = (0, 1, 2)
"""Busy processes beside a step."""
MOST = {1: 2.2, 2: 3.3}
"""Bar of a step's time over that of a quiet one, on two cores."""
MOST_OF_SPINNING = 1.02
SPINNING = ("GOMP_SPINCOUNT=300000",)
"""libgomp's own count where nobody gives one."""
IN_A_ROW = 4
"""Steps of a turn in the quiet part."""
BUSY = "import ctypes, os\nctypes.CDLL(None).prctl(1, 9)\nwhile os.getppid() == {parent}: sum(range(100000))"
"""A process that ends with the one that started it, by a signal (PR_SET_PDEATHSIG) where it is stopped."""


class Company(Callback):
    """Has busy processes run beside the steps of a training, and writes the seconds of each step by their number."""

    def __init__(self, output: str, counts: Sequence[int]):
        self.output, self.counts = Path(output), counts
        self.seconds: dict[int, list[float]] = {count: [] for count in counts}
        self.processes: list[subprocess.Popen[bytes]] = []
        self.started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        command = [sys.executable, "-c", BUSY.format(parent=os.getpid())]
        self.processes = [subprocess.Popen(command) for _ in range(max(self.counts))]
        self.have(0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.have(self.counts[batch_idx % len(self.counts)])
        self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        float(pl_module.step_metrics["loss"])  # type: ignore[arg-type, index]
        self.seconds[self.counts[batch_idx % len(self.counts)]].append(time.perf_counter() - self.started)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.output.write_text(json.dumps(self.seconds))
        self.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.end()

    def have(self, count: int) -> None:
        """Let so many of the processes run and the others wait."""
        for place, process in enumerate(self.processes):
            process.send_signal(signal.SIGCONT if place < count else signal.SIGSTOP)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.processes = []


def words_of(options: argparse.Namespace, steps: int, folder: Path) -> list[str]:
    workload = Workload("", options.rows, options.tokens)
    model = write_shape(options.shape, folder / "model")
    return [*model, "method=lora", *workload.write_rows(folder, steps), "schedule=constant"]


def step_seconds(options: argparse.Namespace, counts: Sequence[int]) -> dict[int, list[float]]:
    """Train; return the seconds of the steps after the warm-up by the number of busy processes beside them."""
    steps = (WARM_UP_STEPS + options.steps) * len(counts)
    with tempfile.TemporaryDirectory() as temporary:
        folder, output = Path(temporary), Path(temporary) / "seconds.json"
        company = f"{{_target_:benchmarks.busy.Company,output:{output},counts:[{','.join(map(str, counts))}]}}"
        command = [
            sys.executable, "-m", "lightning_peft", "train", *words_of(options, steps, folder),
            f"trainer.max_steps={steps}", "logger=none", f"run_dir={folder}/run", f"+callbacks.company={company}",
        ]  # fmt: skip
        paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        with (folder / "log").open("w") as log:
            training = subprocess.Popen(command, env={**os.environ, **paths}, stdout=log, stderr=log)
            if training.wait():
                raise RuntimeError(f"train ended early:\n{(folder / 'log').read_text()[-END_OF_OUTPUT:]}")
        return {int(count): found[WARM_UP_STEPS:] for count, found in json.loads(output.read_text()).items()}


def measure_beside(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the seconds of every step by the number of busy processes, and the ratios of their medians to quiet."""
    seconds = step_seconds(options, COUNTS)
    medians = {count: statistics.median(found) for count, found in seconds.items()}
    ratios = {f"{count}_to_quiet": medians[count] / medians[0] for count in COUNTS[1:]}
    return {"seconds": {str(count): found for count, found in seconds.items()}, **ratios}


def measure_quiet(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the seconds of quiet steps, as is and with threads that spin, and the median ratio of neighbours.

    The two take a few steps at a turn. The pause before it is so long that neither is the other's busy neighbour.
    """
    steps = (1 + options.turns) * IN_A_ROW  # the first turn warms up
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        words = words_of(options, steps, folder)
        commands = {
            "as_it_is": train_command(words, steps, folder / "run"),
            "spinning": ["env", *SPINNING, *train_command(words, steps, folder / "spinning")],
        }
        sides = run_in_turns(commands, steps, folder, 3600, in_a_row=IN_A_ROW, pause=3 * EVERY)
    seconds = {name: side["seconds"][IN_A_ROW:] for name, side in sides.items()}
    ratios = [one / other for one, other in zip(*map(by_turn, seconds.values()), strict=True)]
    return {"seconds": seconds, "to_spinning": statistics.median(ratios)}


def by_turn(seconds: Sequence[float]) -> list[float]:
    """Return the mean seconds of a step for each turn."""
    turns = range(0, len(seconds), IN_A_ROW)
    return [statistics.fmean(seconds[place : place + IN_A_ROW]) for place in turns]


PARTS = {"beside": measure_beside, "quiet": measure_quiet}


def above_bars(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Return a line for each figure that is slower than it may be."""
    bars = [("beside", f"{count}_to_quiet", most) for count, most in MOST.items()]
    bars.append(("quiet", "to_spinning", MOST_OF_SPINNING))
    return [
        f"{part}: {name} is {rows[part][name]:.2f}, and may be {most}"
        for part, name, most in bars
        if part in rows and rows[part][name] > most
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shape", choices=SHAPES, default="smollm2_135m")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=15, help="that are timed, of each kind")
    parser.add_argument("--turns", type=int, default=30, help=f"of {IN_A_ROW} steps each, in the quiet part")
    parser.add_argument("--output", type=Path, default=FOLDER / "busy.json")
    options = parser.parse_args(arguments)
    settings = {key: getattr(options, key) for key in ("shape", "rows", "tokens", "steps", "turns")}
    for name in (*WAITING, "OMP_NUM_THREADS"):  # `train`'s own decisions are measured
        os.environ.pop(name, None)
    results = Results(options.output, settings)
    for part in options.part:
        if part in results.rows:
            continue
        row = PARTS[part](options)
        results.add(part, row)
        print(f"{part}: " + ", ".join(f"{key} {value:.2f}x" for key, value in row.items() if key != "seconds"))
    above = above_bars(results.rows)
    print("\n".join(above) if above else "within the bars")
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
