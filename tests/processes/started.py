"""Starts of the command line as processes of their own, without the eight seconds that each spends on imports.

They are forked from a process that has imported what a start imports (`preloaded.py`). From there on everything is
real: arguments, environment, working folder, pipes, signals by pid, exit status, the end of the interpreter. A test
of imports themselves, threads, memory or what another interpreter prints takes `subprocess`.
"""

import atexit
import functools
import inspect
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

COMMAND = [sys.executable, "-m", "lightning_peft"]
OF_ONE_START = (
    "PYTHONPATH", "PYTEST_CURRENT_TEST", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK",
    "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE",
    "TORCHELASTIC_RESTART_COUNT", "BENCHMARK_PIPES",
)  # fmt: skip
"""Variables that no import reads. Starts that differ in any other are forked from different processes."""


AT_THE_BEGINNING = {
    number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
}
"""Handlers of signals in this process before a test runs in it."""


@contextmanager
def signals_of_the_beginning() -> Iterator[None]:
    """Let no start inherit a signal that a test left ignored, inside the block: all later forks would have it."""
    now = {number: signal.signal(number, handler) for number, handler in AT_THE_BEGINNING.items()}
    try:
        yield
    finally:
        for number, handler in now.items():
            signal.signal(number, handler)


class Preloaded:
    """The process that starts of one environment are forked from."""

    def __init__(self, environment: Mapping[str, str]):
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, str(Path(__file__).with_name("preloaded.py")), str(theirs.fileno())]
            # It gets pipes, as its stream objects stay: those opened for a file would seek in a fork's pipe.
            with signals_of_the_beginning():
                self.process = subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                    pass_fds=[theirs.fileno()],
                )  # fmt: skip
        atexit.register(self.close)

    def fork(self, request: dict[str, Any], files: dict[int, int]) -> tuple[int, socket.socket]:
        """Return the pid of a new process and the socket on which its status comes; `files` are ours by its numbers."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            text = json.dumps(request | {"files": list(files)}).encode()
            socket.send_fds(self.control, [text], [theirs.fileno(), *files.values()])
        if not (pid := ours.recv(64)):
            ours.close()
            raise RuntimeError(f"what starts are forked from has ended: {self.process.communicate()[1].decode()}")
        return int(pid), ours

    def close(self) -> None:
        self.control.close()
        self.process.communicate()


@functools.cache
def preloaded(environment: frozenset[tuple[str, str]]) -> Preloaded:
    ours = {"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}
    return Preloaded(dict(environment) | ours)


class Started(subprocess.Popen):  # type: ignore[type-arg]
    """A process as `subprocess.Popen` has it, forked instead of started; of its options those that tests use."""

    def _execute_child(self, *given: Any) -> None:
        # Popen calls these once the pipes are made; their names and order are those of this Python's Popen.
        options = inspect.signature(super()._execute_child).bind(*given).arguments
        arguments = [os.fspath(word) for word in options["args"]]
        left_out = [name for name in ("shell", "preexec_fn", "executable") if options[name]]
        assert arguments[0] == sys.executable and not left_out, (arguments, left_out)
        environment = dict(os.environ if options["env"] is None else options["env"])
        request = {
            "arguments": arguments,
            "environment": environment,
            "cwd": os.fspath(options["cwd"] or os.getcwd()),
            "new_session": options["start_new_session"],
        }
        ends = [options[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        files = {number: number if end == -1 else end for number, end in enumerate(ends)}
        files |= {number: number for number in options["pass_fds"]}
        imported_with = frozenset(item for item in environment.items() if item[0] not in OF_ONE_START)
        try:
            self.pid, self.answer = preloaded(imported_with).fork(request, files)
            self._child_created = True
        finally:
            pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
            self._close_pipe_fds(*(options[name] for name in pipes))

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        """Return what os.waitpid(self.pid, wait_flags) gives for a child of this process."""
        ready, _, _ = select.select([self.answer], [], [], 0 if wait_flags & os.WNOHANG else None)
        if not ready:
            return 0, 0
        with self.answer:
            return self.pid, int(self.answer.recv(64))

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self._handle_exitstatus(status)
        return self.returncode


def forked_where_it_can_be(arguments: Sequence[str | Path], **options: Any) -> subprocess.Popen[Any]:
    """Return what stands in for subprocess.Popen where the code under test starts `python -m MODULE` itself."""
    is_module = list(arguments[:2]) == [sys.executable, "-m"]
    return (Started if is_module else POPEN)(arguments, **options)


POPEN = subprocess.Popen


def run(arguments: Sequence[str | Path], timeout: float = 600, **options: Any) -> subprocess.CompletedProcess[Any]:
    """Return what subprocess.run(..., capture_output=True, text=True) returns, of a forked process."""
    captured = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with Started(arguments, **(captured | options)) as process:
        try:
            printed = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, *printed)


def run_on_ranks(count: int, *program: str | Path, seconds: float = 600, status: int = 0) -> tuple[str, str]:
    """Run a program on so many processes of one thread as torchrun does, one of them alone: stdout and stderr of all.

    They meet in a store of this process. Where one ends with another exit status than `status` the others are ended;
    AssertionError with their messages.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": str(os.getpid()),
        "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    own = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)] if count > 1 else [{}]
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as messages:
        environments = [os.environ | {"OMP_NUM_THREADS": "1"} | variables for variables in own]
        command = [sys.executable, *program]
        ranks = [Started(command, stdout=out, stderr=messages, env=variables) for variables in environments]
        try:
            while None in [rank.poll() for rank in ranks]:
                if any(rank.returncode not in (None, status) for rank in ranks) or time.monotonic() > deadline:
                    break
                time.sleep(0.05)
        finally:
            statuses = [rank.poll() for rank in ranks]
            for rank in ranks:
                rank.kill()
                rank.wait()
        for file in (out, messages):
            file.seek(0)
        printed, said = out.read(), messages.read()
        assert statuses == [status] * count, f"exit statuses {statuses}\n{said[-4000:]}"
        return printed, said
