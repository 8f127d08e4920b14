"""Print the peak of anonymous memory while a folder's model loads, above its value before, and the model's size."""

import json
import sys
import threading

import bitsandbytes  # noqa: F401  imported before the baseline is taken
import torch

from lightning_peft.models.loading import load_model
from lightning_peft.models.source import ModelConfig
from lightning_peft.quantization.config import Kind, QuantizationConfig


def anonymous_bytes() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def main(folder: str, kind: str) -> None:
    load_model(ModelConfig("tiny"), torch.bfloat16, QuantizationConfig(Kind.nf4))  # first calls allocate their own
    before = peak = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_model(ModelConfig("hf", folder), torch.bfloat16, QuantizationConfig(Kind[kind]))
    done.set()
    watcher.join()
    size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    print(json.dumps({"peak": peak - before, "model": size}))


if __name__ == "__main__":
    main(*sys.argv[1:])
