"""The walks of `docs/architecture.md`, taken by a tracer in a real run.

**A row to its loss.** A hop is a function of the package out of which the row comes, in any of its forms, and goes into
another file. It comes out by `return` or `yield`; its forms are a row, turns, rendered text, a sample (tokens and
labels), a batch, and the losses. So at each hop a reader turns to another file. A function is no hop where its caller,
the nearest of the package, is in its own file, as both are read on one page; nor where it answers a question about the
row with something else: a piece of text, a number, a name. A set of samples at rest, in memory or mapped from disk, is
no form of a row: the walk goes into it and comes out of it.

**A rank to its layer.** The functions of the package that are on the stack when a layer is made.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback
from transformers import PreTrainedTokenizerBase

import lightning_peft
from lightning_peft.data.batch import Batch
from lightning_peft.data.chat import Encoded
from lightning_peft.data.conversation import Message, Row
from lightning_peft.data.rendering import Rendered

PACKAGE = str(Path(lightning_peft.__file__).parent) + "/"
Hop = tuple[str, str]
"""File of a function in the package, and its name."""


def of_package(frame: FrameType | None) -> Iterator[FrameType]:
    """Iterate over the frames of the package on a stack, the innermost first."""
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            yield frame
        frame = frame.f_back


def hop_of(frame: FrameType) -> Hop:
    return frame.f_code.co_filename.removeprefix(PACKAGE), frame.f_code.co_qualname


@contextmanager
def profiled(see: Callable[[FrameType, str, Any], None] | None) -> Iterator[None]:
    """Have `see` told of each call and return, inside the block; behind it, whoever was told before."""
    before = sys.getprofile()
    sys.setprofile(see)
    try:
        yield
    finally:
        sys.setprofile(before)


class RowWalk:
    """The hops of a row, in the order in which it first takes them."""

    def __init__(self, mark: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take mark, a text that is in the row and nowhere else."""
        self.mark = mark
        self.tokenizer = tokenizer
        self.hops: list[Hop] = []

    def see(self, frame: FrameType, event: str, value: Any) -> None:
        if event != "return" or value is None or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        if not (self.holds(value) or self.is_loss(value, frame)):
            return
        above = next(of_package(frame.f_back), None)
        hop = hop_of(frame)
        if (above is None or hop_of(above)[0] != hop[0]) and hop not in self.hops:
            self.hops.append(hop)

    def holds(self, value: Any) -> bool:
        """Return whether a value is a form of the row, or a collection of such."""
        if isinstance(value, Row):
            return self.mark in str(value.values)
        if isinstance(value, Message):
            return self.mark in value.content
        if isinstance(value, Rendered):
            return self.mark in value.text
        if isinstance(value, Encoded):
            return self.mark in self.tokenizer.decode(value.input_ids)
        if isinstance(value, Batch):
            return self.mark in self.tokenizer.decode(value.input_ids.flatten())
        if isinstance(value, dict):
            value = list(value.values())
        return isinstance(value, list | tuple) and any(map(self.holds, value))

    def is_loss(self, value: Any, frame: FrameType) -> bool:
        """Return whether a value is the losses of tokens, or their sum, of a training step."""
        if not isinstance(value, torch.Tensor) or value.dim() > 1 or not value.is_floating_point():
            return False
        return any(hop_of(one) == ("training/module.py", "FinetuneModule.training_step") for one in of_package(frame))


class Traced(Callback):
    """Traces the second step of a training, with its batch; the first finds out how the model makes its logits."""

    def __init__(self, walk: RowWalk) -> None:
        self.walk = walk

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        sys.setprofile(self.walk.see if trainer.global_step == 1 else None)


def stack_of(frame: FrameType | None) -> list[Hop]:
    """Return the functions of the package on a stack, the outermost first."""
    return [hop_of(one) for one in of_package(frame)][::-1]
