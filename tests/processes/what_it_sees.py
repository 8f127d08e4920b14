"""Print what a process finds around itself, as JSON, and leave in the way the first word says."""

import atexit
import json
import os
import signal
import sys
import threading
import time
import warnings

VARIABLES_OF_THE_SHELL = ("_", "LC_CTYPE")
DISPOSITIONS = ("SigBlk", "SigIgn", "SigCgt")
OF_GLIBC = 0b11 << 31
"""Signals 32 and 33, which glibc takes for itself with the first library that asks."""


def main() -> None:
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    signals = {key: int(lines[key], 16) & ~OF_GLIBC for key in DISPOSITIONS}
    seen = {
        "argv": sys.argv, "orig_argv": sys.orig_argv, "path": sys.path, "cwd": os.getcwd(), "flags": repr(sys.flags),
        "environment": {key: value for key, value in os.environ.items() if key not in VARIABLES_OF_THE_SHELL},
        "leads_a_session": os.getsid(0) == os.getpid(), "group": os.getpgid(0) == os.getpid(), "signals": signals,
        "encodings": [(s.encoding, s.errors, s.line_buffering) for s in (sys.stdin, sys.stdout, sys.stderr)],
        "open_files": sorted(os.listdir("/proc/self/fd")), "threads": threading.active_count(),
        "main": [__name__, os.path.basename(__file__), sys.modules["__main__"].__dict__["main"] is main],
        "filters": [str(entry) for entry in warnings.filters if entry[0] == "error"], "limit": sys.getrecursionlimit(),
        "input": sys.stdin.readline(), "umask": os.umask(0o22),
    }  # fmt: skip
    print(json.dumps(seen))
    atexit.register(print, "the end")
    threading.Timer(0.1, print, ["a thread"]).start()
    how = sys.argv[1]
    if how == "raise":
        raise RuntimeError("it broke")
    if how == "_exit":
        os._exit(4)
    if how == "sleep":
        time.sleep(600)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(int(how))


if __name__ == "__main__":
    main()
