"""The lines of a run's log as a file, beside the terminal and its progress bar, which are left alone."""

import logging
import threading
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)s %(message)s"
PRINTED = "log.txt"
"""The file in a trial's folder with what it printed, where other trials run beside it."""


class RunLog:
    """Writes what is logged from its making on, until it is closed.

    Made in a thread of its own, as a run that trains beside others in a process, it takes the lines of that thread.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.handler = logging.FileHandler(path, encoding="utf-8")
        self.handler.setFormatter(logging.Formatter(FORMAT))
        thread = threading.current_thread()
        if thread is not threading.main_thread():
            self.handler.addFilter(lambda record: record.thread == thread.ident)
        logging.getLogger().addHandler(self.handler)

    def close(self) -> None:
        logging.getLogger().removeHandler(self.handler)
        self.handler.close()
