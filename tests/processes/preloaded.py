"""A process that has imported what a start of `lightning_peft` imports, and from which starts are forked.

usage: preloaded.py CONTROL, the number of a socket over which `started.py` asks. It computes nothing itself and has no
thread. A fork leaves `forked()` with what was asked for, runs it as `__main__`, and ends as an interpreter ends:
through SystemExit or the last line of this file.
"""

import fcntl
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import types
from pathlib import Path
from typing import Any

LARGEST_REQUEST, MOST_FILES = 1 << 20, 64


def import_what_a_start_imports() -> None:
    from lightning_peft.allocator import let_segments_grow
    from lightning_peft.threads import set_up_threads

    before = dict(os.environ)
    os.environ.setdefault("GOMP_SPINCOUNT", "0")  # a thread would look at the neighbours, and no fork have it
    set_up_threads()  # `main` does so before torch is imported
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy would start its threads when it is imported
    let_segments_grow()
    for name in ("command_line", "commands.training", "commands.train"):
        importlib.import_module(f"lightning_peft.{name}")
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"the imports started {len(threads) - 1} threads, which no fork would have"
    os.environ.clear()
    os.environ.update(before)
    gc.collect()
    gc.freeze()  # the first collection of each fork would copy every page


def forked(control: socket.socket) -> dict[str, Any]:
    """Fork a process for each request, and report pids and statuses; only a fork returns, with its request.

    The process itself ends when `control` is closed at the other end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-c is for those who ask
    children: dict[int, socket.socket] = {}
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select()]
            if woken in ready:
                os.read(woken, 4096)
                report_those_that_ended(children)
            if control not in ready:
                continue
            text, received, _, _ = socket.recv_fds(control, LARGEST_REQUEST, MOST_FILES)
            if not text:
                sys.exit()
            answer, *files = received
            pid = os.fork()
            if pid == 0:
                break
            for file in files:
                os.close(file)
            children[pid] = socket.socket(fileno=answer)
            children[pid].send(str(pid).encode())
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as conftest.py has it, also behind a shell
    for other in children.values():
        other.close()
    control.close()
    for descriptor in (answer, woken, wake):
        os.close(descriptor)
    request: dict[str, Any] = json.loads(text)
    above = max(request["files"]) + 1  # none of them takes the place of another then
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD, above) for file in files]
    for file in files:
        os.close(file)
    for file, number in zip(moved, request["files"], strict=True):
        os.dup2(file, number)
        os.close(file)
    return request


def report_those_that_ended(children: dict[int, socket.socket]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with children.pop(pid) as answer:
            try:
                answer.send(str(status).encode())
            except BrokenPipeError:  # nobody waits for it
                pass


def become(request: dict[str, Any]) -> None:
    """Take the place that a new interpreter would have: group, folder, environment, paths, arguments, randomness."""
    import numpy

    if request["new_session"]:
        os.setsid()
    os.chdir(request["cwd"])
    own = search_path(os.environ.get("PYTHONPATH"))
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[:] = [os.getcwd(), *search_path(os.environ.get("PYTHONPATH")), *(p for p in sys.path[1:] if p not in own)]
    importlib.invalidate_caches()
    sys.orig_argv[:] = request["arguments"]
    sys.stdout.reconfigure(line_buffering=sys.stdout.isatty())  # type: ignore[union-attr]
    numpy.random.seed()
    sys.modules["__main__"] = types.ModuleType("__main__")


def search_path(variable: str | None) -> list[str]:
    return list(dict.fromkeys(os.path.abspath(entry) for entry in variable.split(os.pathsep))) if variable else []


def run(words: list[str]) -> None:
    """Run `-m MODULE WORDS`, `-c CODE WORDS` or `PROGRAM WORDS` as the interpreter does."""
    if words[0] == "-m":
        sys.argv[:] = words[1:]
        runpy._run_module_as_main(words[1])  # type: ignore[attr-defined]  # what `python -m` itself calls
        return
    main = sys.modules["__main__"]
    if words[0] == "-c":
        sys.argv[:] = [words[0], *words[2:]]
        sys.path[0] = ""
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
        return
    sys.argv[:] = words
    sys.path[0] = os.path.dirname(os.path.abspath(words[0]))
    main.__file__ = words[0]
    exec(compile(Path(words[0]).read_bytes(), words[0], "exec"), main.__dict__)


if __name__ == "__main__":
    import_what_a_start_imports()
    request = forked(socket.socket(fileno=int(sys.argv[1])))
    become(request)
    run(request["arguments"][1:])
