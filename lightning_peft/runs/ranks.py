"""Starts the ranks of a run on this node, every one from the run's `config.yaml`."""

import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import (
    DefaultLogsSpecs,
    SignalException,
    SubprocessContext,
    start_processes,
)

from lightning_peft.distributed import LAUNCHER
from lightning_peft.training.preemption import INTERRUPTED, PREEMPTED, Interrupted, Preempted

PASSED_ON = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
"""Signals to this process that go to every rank, which decides what they mean."""
SECONDS_BETWEEN_LOOKS = 0.1
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable with the file a rank writes its last words to; torchrun sets it as well."""


def run_ranks(config_path: Path, count: int) -> None:
    """Train with `count` processes and wait for them. Raises SystemExit with the exit status of the first that fails.

    Preempted where they were asked to leave. A rank that fails ends the others. The command is the one a cluster's
    `srun` uses, `python -m lightning_peft train config_path=...`: the words of a sweep never reach a rank.
    """
    # The ranks meet in a store of this process: a port found free would be someone else's a moment later.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": str(os.getpid()),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        LAUNCHER: str(os.getpid()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count))),
    }
    arguments = ("-m", "lightning_peft", "train", f"config_path={config_path}")
    with tempfile.TemporaryDirectory() as folder, signals_raised():
        ranks = start_processes(
            name="train",
            entrypoint=sys.executable,
            args=dict.fromkeys(range(count), arguments),
            envs={rank: common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)},
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        assert isinstance(ranks, SubprocessContext)
        try:
            failed = first_failures(ranks)
        finally:
            ranks.close()
        for reason in (Interrupted, Preempted):
            if reason.exit_status in failed.values():
                raise reason
        if failed:
            raise SystemExit(report(failed, ranks.error_files))


def first_failures(ranks: SubprocessContext) -> dict[int, int]:
    """Wait until a rank fails, or all are done; the exit status of each that failed by itself. Passes signals on."""
    while True:
        try:
            status = {rank: handler.proc.poll() for rank, handler in ranks.subprocess_handlers.items()}
            failed = {rank: code for rank, code in status.items() if code and code not in (PREEMPTED, INTERRUPTED)}
            if failed:
                return failed
            if None not in status.values():  # ranks asked to leave are waited for: one may still be flushing its logger
                return {rank: code for rank, code in status.items() if code}
            time.sleep(SECONDS_BETWEEN_LOOKS)
        except SignalException as received:
            for handler in ranks.subprocess_handlers.values():
                handler.proc.send_signal(received.sigval)


def report(failed: dict[int, int], error_files: dict[int, str]) -> int:
    """The exit status for the ranks that failed; what they could not say themselves goes to stderr."""
    # One that was killed comes first: the others failed because it was gone.
    rank, code = min(failed.items(), key=lambda item: (item[1] > 0, item[0]))
    if code < 0:
        print(f"error: rank {rank} was ended by {signal.Signals(-code).name}", file=sys.stderr)
        return 128 - code
    if rank != 0 and (last_words := Path(error_files[rank])).exists():
        print(f"error: rank {rank}: {json.loads(last_words.read_text())['message']['message']}", file=sys.stderr)
    return code


def leave_with_launcher() -> None:
    """For a rank: end when the process that started it was killed, and so could not end the ranks itself."""
    if LAUNCHER not in os.environ:
        return
    launcher = int(os.environ[LAUNCHER])

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.write(2, b"what started this rank is gone: leaving; resume=auto goes on from the last checkpoint\n")
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def leave_last_words(line: str) -> bool:
    """For a rank other than zero: leave the line to whoever started the ranks; False where nobody would read it."""
    if ERROR_FILE not in os.environ:
        return False
    words = {"message": {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}}
    Path(os.environ[ERROR_FILE]).write_text(json.dumps(words))
    return True


@contextmanager
def signals_raised() -> Iterator[None]:
    """Inside, PASSED_ON raise SignalException in the main thread; afterwards they do what they did before."""
    variable = "TORCHELASTIC_SIGNALS_TO_HANDLE"
    before = {name: signal.getsignal(signal.Signals[name]) for name in PASSED_ON}
    os.environ[variable] = ",".join(PASSED_ON)
    try:
        yield
    finally:
        del os.environ[variable]
        if threading.current_thread() is threading.main_thread():
            for name, handler in before.items():
                signal.signal(signal.Signals[name], handler)
