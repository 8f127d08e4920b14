"""Start the ranks of a run on this node, every one from the run's `config.yaml`."""

import json
import logging
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import (
    DefaultLogsSpecs,
    SignalException,
    SubprocessContext,
    start_processes,
)

from lightning_peft import distributed
from lightning_peft.distributed import LAUNCHER
from lightning_peft.threads import available_cores
from lightning_peft.training.preemption import INTERRUPTED, PREEMPTED, REPEAT_SECONDS, Interrupted, Paused, Preempted
from lightning_peft.training.signal_watch import SIGNAL_WATCH

WRONG_INPUT = 2
"""Exit status of a rank whose input is wrong."""
PASSED_ON = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
"""Signals to this process that go to every rank, which decides what they mean."""
SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_TO_FOLLOW = 120.0
"""Time from the first rank that left as it was asked to, until those that are still here are ended."""
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable with the file a rank writes its last words to; torchrun sets it as well."""
SECONDS_FOR_LAST_WORDS = 5.0
"""Time that a rank which lost the others waits to leave: whoever started them ends all at the first that does."""


def run_ranks(config_path: Path, count: int) -> None:
    """Train with `count` processes and wait for them. Raises SystemExit with the exit status of the first that fails.

    Raises Interrupted or Preempted where they left because a signal to this process asked them to, Paused where they
    left without one. A rank that fails ends the others. The command is the one a cluster's
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
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, available_cores() // count))),
    }
    arguments = ("-m", "lightning_peft", "train", f"config_path={config_path}")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)  # it warns of each rank it ends
    SIGNAL_WATCH.stop()  # the ranks know when to leave
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
            failed, is_asked = first_failures(ranks)
        finally:
            ranks.close()
        for reason in (Interrupted, Preempted if is_asked else Paused):
            if reason.exit_status in failed.values():
                raise reason
        if failed:
            raise SystemExit(report(failed, ranks))


def first_failures(ranks: SubprocessContext) -> tuple[dict[int, int], bool]:
    """Wait until a rank fails, or all are done, and pass signals on.

    Return the exit status of each that failed by itself, and whether a signal to this process asked them to leave.
    """
    signalled_at = give_up_at = math.inf
    while True:
        try:
            status = {rank: handler.proc.poll() for rank, handler in ranks.subprocess_handlers.items()}
            failed = {rank: code for rank, code in status.items() if code and code not in (PREEMPTED, INTERRUPTED)}
            if failed:
                wait_for_last_words(ranks)
                return failed, math.isfinite(signalled_at)
            if None not in status.values():
                return {rank: code for rank, code in status.items() if code}, math.isfinite(signalled_at)
            # Ranks asked to leave are waited for: one may still be flushing its logger.
            if time.monotonic() > give_up_at:
                return dict.fromkeys(status, PREEMPTED), math.isfinite(signalled_at)
            if {PREEMPTED, INTERRUPTED} & set(status.values()):
                give_up_at = min(give_up_at, time.monotonic() + SECONDS_TO_FOLLOW)
            time.sleep(SECONDS_BETWEEN_LOOKS)
        except SignalException as received:
            now = time.monotonic()
            if now - signalled_at > REPEAT_SECONDS:
                give_up_at = min(give_up_at, now + SECONDS_FOR_LAST_WORDS)
            signalled_at = min(signalled_at, now)
            for handler in ranks.subprocess_handlers.values():
                handler.proc.send_signal(received.sigval)


def wait_for_last_words(ranks: SubprocessContext) -> None:
    """Let the ranks that go on after a failure find out by themselves: they write their end into the run's folder."""
    deadline = time.monotonic() + SECONDS_FOR_LAST_WORDS
    while time.monotonic() < deadline:
        running = [rank for rank, handler in ranks.subprocess_handlers.items() if handler.proc.poll() is None]
        if all(Path(ranks.error_files[rank]).exists() for rank in running):
            return
        time.sleep(SECONDS_BETWEEN_LOOKS)


def report(failed: dict[int, int], ranks: SubprocessContext) -> int:
    """Return the exit status for the ranks that failed; one line on stderr says which was the first, and of what."""
    words = {rank: read_last_words(ranks.error_files[rank]) for rank in failed}
    # A rank that was killed comes first, one that only lost the others last.
    rank, code = min(failed.items(), key=lambda item: (words[item[0]].get("is_lost", False), item[1] > 0, item[0]))
    if code < 0:
        print(f"error: rank {rank} was ended by {signal.Signals(-code).name}", file=sys.stderr)
        return 128 - code
    left = [rank for rank, handler in ranks.subprocess_handlers.items() if handler.proc.poll() == 0]
    if words[rank].get("is_lost") and left:
        print(f"error: rank {left[0]} left before the end of the training, with exit status 0", file=sys.stderr)
    elif words[rank]:
        print(f"error: rank {rank}: {words[rank]['message']['message']}", file=sys.stderr)
    elif rank != 0 or code != WRONG_INPUT:  # rank zero has said itself what is wrong with the input
        print(f"error: rank {rank} ended with exit status {code}", file=sys.stderr)
    return code


def leave_with_launcher() -> None:
    """End this rank when the process that started it was killed, and so could not end the ranks itself."""
    if LAUNCHER not in os.environ:
        return
    launcher = int(os.environ[LAUNCHER])

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.write(2, b"what started this rank is gone: leaving; resume=auto goes on from the last checkpoint\n")
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def leave_last_words(line: str, is_lost: bool = False) -> bool:
    """Leave a rank's line to whoever started the ranks; return False where nobody would read it.

    `is_lost` says that another rank was gone first.
    """
    if ERROR_FILE not in os.environ:
        return False
    words = {"message": {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}, "is_lost": is_lost}
    Path(os.environ[ERROR_FILE]).write_text(json.dumps(words))
    return True


def read_last_words(path: str) -> dict[str, Any]:
    """Return what `leave_last_words` wrote; empty where the rank left none."""
    return json.loads(Path(path).read_text()) if Path(path).exists() else {}


def say_others_are_lost(error: BaseException) -> None:
    """Say in one line that this rank could not go on without the others, and give the first to go time to say why."""
    rank = distributed.rank()
    line = f"lost another rank ({' '.join(str(error).split())[:200]})"
    if not leave_last_words(line, is_lost=True):
        print(f"error: rank {rank}: {line}", file=sys.stderr)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whoever started the ranks may end this one now, without a word
    time.sleep(SECONDS_FOR_LAST_WORDS)


@contextmanager
def signals_raised() -> Iterator[None]:
    """Have PASSED_ON raise SignalException in the main thread, inside the block; afterwards they do as before.

    A signal that is ignored stays ignored, here and in the ranks: `nohup` and a shell's `&` have asked for that.
    """
    variable = "TORCHELASTIC_SIGNALS_TO_HANDLE"
    before = {name: signal.getsignal(signal.Signals[name]) for name in PASSED_ON}
    before = {name: handler for name, handler in before.items() if handler is not signal.SIG_IGN}
    os.environ[variable] = ",".join(before)
    try:
        yield
    finally:
        del os.environ[variable]
        if threading.current_thread() is threading.main_thread():
            for name, handler in before.items():
                signal.signal(signal.Signals[name], handler)
