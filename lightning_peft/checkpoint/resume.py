"""Checkpoints a run resumes from: trainable state only, written so that a kill at any moment leaves a good one."""

import errno
import io
import logging
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_peft.adapters.base import Adapter
from lightning_peft.checkpoint.atomic import atomic_file

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d+)\.ckpt")


class CheckpointFileError(ValueError):
    """A checkpoint that cannot be read, or that does not fit the model."""


class UnreadableCheckpoint(CheckpointFileError):
    """A checkpoint that is there and that the system does not let this process read."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint after `step` optimiser steps is kept."""
    return folder / f"step-{step:08d}.ckpt"


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first. Files still being written are not among them.

    Raise OSError for a folder that cannot be listed: that is no folder without checkpoints.
    """
    try:
        paths = list(folder.iterdir())  # glob would give nothing for a folder it may not list
    except FileNotFoundError:
        return []
    found = [path for path in paths if _NAME.fullmatch(path.name) and path.is_file()]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("step-")))


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that is whole, or None without any; skip damaged ones with a logged line.

    Raise CheckpointFileError when there are checkpoints and all are damaged, and when one cannot be read (permissions,
    I/O): nobody knows then what is in it, and to start again would overwrite it.
    """
    there = checkpoints(folder)
    for path in reversed(there):
        try:
            verify_checkpoint(path)
            return path
        except UnreadableCheckpoint:
            raise
        except CheckpointFileError as error:
            if path == there[0]:
                raise CheckpointFileError(
                    f"{error}; none of the {len(there)} checkpoints there is whole: bring one back, or start afresh in "
                    "a new run_dir"
                ) from error
            logger.warning("%s; trying the one before it", error)
    return None


def verify_checkpoint(path: Path) -> None:
    """Read the whole file and compare its checksums.

    Raises CheckpointFileError for a missing or damaged file, UnreadableCheckpoint for one that cannot be read.
    """
    try:
        if not path.is_file():
            raise CheckpointFileError(f"{path}: no such checkpoint file")
        file = path.open("rb")
    except OSError as error:
        raise UnreadableCheckpoint(f"{path}: cannot be read ({error.strerror}), so nothing is known of it") from error
    try:
        with file, zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # zipfile seeks before the start of a file cut short
            raise CheckpointFileError(f"{path}: truncated or not a checkpoint ({error})") from error
        raise UnreadableCheckpoint(f"{path}: cannot be read ({error.strerror}), so nothing is known of it") from error
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise CheckpointFileError(f"{path}: truncated or not a checkpoint ({error})") from error
    if damaged is not None:
        raise CheckpointFileError(f"{path}: damaged, the checksum of {damaged} does not match")


class AtomicCheckpointIO(CheckpointIO):
    """A Trainer plugin that writes beside the file, reads it back, and only then renames it.

    With `asynchronous` a thread does so from a copy in host memory; what it meets is raised by the next save or by
    `teardown`, which both wait for it. The newest `keep_last` of the files named by `checkpoint_path` are kept, all
    when None. Checkpoints are loaded with `weights_only=True`: tensors and plain Python values, never code.

    A LightningModule must override these so that only trainable state is saved (Lightning 2.6: `dump_checkpoint` calls
    `state_dict()`, and `restore_model` calls `load_state_dict(state, strict=self.strict_loading)`):

        def state_dict(self, *args, **kwargs):
            return trainable_state_dict(self.model)

        def load_state_dict(self, state_dict, strict=True, assign=False):
            load_trainable_state(self.model, state_dict)

    `strict_loading` stays True: False would hide missing names. `fit(ckpt_path=...)` passes `weights_only=None`, which
    torch reads as True, so hyperparameters must not hold objects and callbacks must return plain values.
    Lightning's ModelParallelStrategy bypasses this plugin when loading; `training.strategies.ShardedModel` does not.
    """

    def __init__(self, keep_last: int | None = None, asynchronous: bool = False):
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"checkpoint.keep_last={keep_last}: must be at least 1, or null to keep all")
        self.keep_last = keep_last
        self.writer = ThreadPoolExecutor(1) if asynchronous else None
        self.writing: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save a checkpoint. Raises SaveError, with the previous checkpoints untouched, when the disk is full."""
        if storage_options is not None:
            raise TypeError(f"storage_options={storage_options!r}: AtomicCheckpointIO has none")
        self.teardown()
        if self.writer is None:
            self._write(partial(_save, checkpoint), Path(path))
            return
        memory = io.BytesIO()
        _save(checkpoint, memory)
        self.writing = self.writer.submit(self._write, lambda file: file.write(memory.getbuffer()), Path(path))

    def teardown(self) -> None:
        """Wait until the last checkpoint is on disk; raise what prevented that. Lightning calls this at a run's end."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def _write(self, write: Callable[[IO[bytes]], Any], path: Path) -> None:
        with atomic_file(path) as unfinished:
            with unfinished.open("wb") as file:
                write(file)
            verify_checkpoint(unfinished)
        if self.keep_last is not None:
            others = [other for other in checkpoints(path.parent) if other != path]
            for old in others[: max(0, len(others) - self.keep_last + 1)]:
                old.unlink()

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint, tensors on the CPU unless `map_location` says otherwise. Raises CheckpointFileError."""
        verify_checkpoint(Path(path))
        try:
            return torch.load(
                path, map_location=map_location or "cpu", weights_only=True if weights_only is None else weights_only
            )
        except (pickle.UnpicklingError, RuntimeError, KeyError, EOFError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointFileError(f"{path}: not a checkpoint of this program ({reason})") from error

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def saved_step(path: Path) -> int:
    """Return the optimiser steps that a checkpoint is behind."""
    return int(_mapped(path)["global_step"])


def saved_content(path: Path) -> dict[str, str]:
    """Return the fingerprints of rows and weights that a checkpoint was made with, as `RunRecord` wrote them."""
    return dict(_mapped(path)["callbacks"].get("RunRecord", {}).get("content", {}))


def saved_selection(path: Path) -> dict[str, Any] | None:
    """Return the modules that a checkpoint's run has chosen to train in full; None for methods that choose none."""
    found: dict[str, Any] | None = _mapped(path).get("selection")
    return found


def saved_guard(path: Path) -> dict[str, Any]:
    """Return what the guard of a checkpoint's run had seen; empty where it kept nothing."""
    return dict(_mapped(path).get("guard", {}))


def _mapped(path: Path) -> dict[str, Any]:
    """Return a checkpoint whose tensors stay on disk."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _save(checkpoint: dict[str, Any], file: Any) -> None:
    """Call `torch.save`; its errors on a full disk are RuntimeErrors of its zip writer."""
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        cause = error.__context__
        if isinstance(cause, OSError):
            raise cause from None
        raise


def trainable_state(model: nn.Module) -> dict[str, nn.Parameter | Tensor]:
    """Return what distinguishes a tuned model from its base, by name and not copied.

    The state is every parameter that trains, and all that adapters hold beside their base layer, frozen factors and
    persistent buffers included.
    """
    state: dict[str, nn.Parameter | Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for layer_name, layer in model.named_modules():
        if isinstance(layer, Adapter):
            for name, tensor in layer.state_dict(keep_vars=True).items():
                if not name.startswith("base_layer."):
                    state[f"{layer_name}.{name}"] = tensor
    return state


def trainable_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return `trainable_state` as `gathered` has it."""
    return gathered(trainable_state(model))


def whole_state(model: nn.Module) -> dict[str, Tensor] | None:
    """Return the state dict of a sharded model as `gathered` has it; None where nothing is sharded."""
    state = model.state_dict(keep_vars=True)
    return gathered(state) if any(isinstance(tensor, DTensor) for tensor in state.values()) else None


def load_trainable_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `state` into the model, in the model's dtypes and shards.

    Raises CheckpointFileError unless names and shapes are those of `trainable_state_dict(model)`.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, Adapter):
            prefix = f"{name}."
            layer.fit_state({key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)})
    own = trainable_state(model)
    check_names_and_shapes("checkpoint", own, state)
    for name, tensor in own.items():
        assign(tensor, state[name])


@torch.no_grad()
def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, detached and not copied; a sharded one whole, in host memory, and on rank zero alone.

    Tensors are gathered one at a time, so no device has to hold them all. Every rank must call it.
    """
    found: dict[str, Tensor] = {}
    whole: dict[int, Tensor | None] = {}  # a tied weight, which has two names, is gathered once
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            found[name] = tensor.detach()
            continue
        if id(tensor) not in whole:
            one = tensor.full_tensor()
            whole[id(tensor)] = one.cpu() if dist.get_rank() == 0 else None
        if (kept := whole[id(tensor)]) is not None:
            found[name] = kept
    return found


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    assert not target.is_meta, "weights arrive before adapters are loaded"
    if isinstance(target, DTensor):
        # Every rank holds the whole value, so each rank cuts its own shard and nothing is sent.
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


def check_names_and_shapes(
    what: str,
    expected: Mapping[str, Tensor],
    got: Mapping[str, Tensor],
    error: type[ValueError] = CheckpointFileError,
) -> None:
    """Raise `error` with one line that names up to three differences."""
    for problem, names in (
        ("lacks", [n for n in expected if n not in got]),
        ("has, and this model does not,", [n for n in got if n not in expected]),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise error(f"{what}: {problem} {', '.join(names[:3])}{more}: was it made with another adapter config?")
    for name, tensor in expected.items():
        if got[name].shape != tensor.shape:
            raise error(
                f"{what}: {name} has shape {tuple(got[name].shape)}, this model needs {tuple(tensor.shape)}: "
                "another rank or another base model?"
            )
