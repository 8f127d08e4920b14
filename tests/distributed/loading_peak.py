"""A callback that measures the host memory a rank takes while its model loads, named by `callbacks.NAME._target_`."""

import json
import os
import threading
from pathlib import Path

import bitsandbytes  # noqa: F401  imported before the baseline is taken
from lightning.pytorch import Callback, LightningModule, Trainer


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


class Measured(Exception):
    """The model is loaded and measured; there is no need to train it."""


class LoadingPeak(Callback):
    """Writes loading-RANK.json into the folder, the peak above what the process had before and the model's bytes, and
    raises Measured."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.peak = 0
        self.done = threading.Event()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self.peak:
            self.before = self.peak = anonymous_bytes()
            self.watcher = threading.Thread(target=self.watch)
            self.watcher.start()

    def watch(self) -> None:
        while not self.done.wait(0.001):
            self.peak = max(self.peak, anonymous_bytes())

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.done.set()
        self.watcher.join()
        tensors = {name: p.numel() * p.element_size() for name, p in pl_module.model.named_parameters()}  # type: ignore
        blocks = sum(size for name, size in tensors.items() if ".layers." in name)
        measured = {"peak": self.peak - self.before, "blocks": blocks, "rest": sum(tensors.values()) - blocks}
        (self.folder / f"loading-{os.environ['RANK']}.json").write_text(json.dumps(measured))
        raise Measured
