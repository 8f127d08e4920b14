"""The cost and gain of each optimiser step, sent to every logger without waiting for the device at each step."""

import resource
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_peft.adapters.base import AdapterConfig
from lightning_peft.adapters.inject import trainable_parameter_counts, trained_in_full
from lightning_peft.compat import is_accumulating
from lightning_peft.data.batch import Batch
from lightning_peft.distributed import of_all, reduce_sums, worst
from lightning_peft.training.guard import Guard
from lightning_peft.training.health import ChangeMeter, ChangeSize
from lightning_peft.training.model_flops import (
    attention_flops,
    linear_flops_per_token,
    model_flops_utilization,
    peak_flops,
    squared_lengths,
)

BEGAN, ENDED, SQUARES, ROWS = "began", "ended", "squared_lengths", "rows"
"""Keys of a pending row that no logger is given."""
WARM_UP_STEPS = 2
"""Steps whose time is not counted: first calls allocate and compile."""


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak allocated on CUDA; on a CPU the peak resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def host_memory_gib() -> float:
    """Return this process's anonymous memory now: mapped files are the machine's. It is the peak of all if not told."""
    status = Path("/proc/self/status")
    _, found, rest = (status.read_text() if status.is_file() else "").partition("RssAnon:")
    return int(rest.split()[0]) / 2**20 if found else peak_memory_gib(torch.device("cpu"))


class Instant:
    """A moment in a device's queue of work; on a CPU the moment on the clock."""

    def __init__(self, device: torch.device):
        self.clock = time.perf_counter()
        self.event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()

    def seconds_since(self, earlier: "Instant") -> float:
        """Return the time between two moments that the device has passed; the host is ahead of it."""
        if self.event is None or earlier.event is None:
            return self.clock - earlier.clock
        return earlier.event.elapsed_time(self.event) / 1000


def rank_and_alpha(module: LightningModule) -> dict[str, float]:
    """Return what a sweep plots the loss against; empty for methods without a rank."""
    config = module.adapter_config
    if not isinstance(config, AdapterConfig) or config.rank is None:
        return {}
    if not config.uses_alpha:
        return {"rank": config.rank}
    return {"rank": config.rank, "alpha": 2.0 * config.rank if config.alpha is None else config.alpha}


def epochs_done(trainer: Trainer) -> float:
    """Return the passes over the rows so far; whole ones only where nobody knows how long one is."""
    batches = trainer.num_training_batches
    done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return trainer.current_epoch + (done / batches if batches != float("inf") else 0.0)


def changes_alone(module: LightningModule) -> dict[str, ChangeSize]:
    """Return the changes of the adapted layers; empty where other modules train beside them. All ranks call it."""
    model, root = cast(PreTrainedModel, module.model), module.objective
    assert isinstance(root, nn.Module)
    return {} if trained_in_full(model) else ChangeMeter().measure(model, root)


class StepMetrics(Callback):
    """Logs loss, grad_norm, lr, tokens, epoch and step_seconds per optimiser step and keeps what `result.json` needs.

    Tokens are those of all ranks, memory is that of the rank that took most.
    Values stay on the device until `trainer.log_every_n_steps` of them have come together.
    """

    def __init__(self, guard: Guard | None = None) -> None:
        self.guard = guard
        self.pending: list[tuple[int, dict[str, Any]]] = []
        """Step and row; tokens are this rank's."""
        self.step_tokens = 0
        self.total_tokens = 0
        """Tokens of all ranks and steps that are flushed, those of earlier starts included."""
        self.step_started = Instant(torch.device("cpu"))
        self.step_squares: Tensor | float = 0.0
        """Squared lengths of the samples of this step, on the device; counted where the peak of the device is known."""
        self.step_rows: list[str] = []
        """The places of the rows of this step, of this rank."""
        self.was_validated = False
        self.durations: list[tuple[float, int]] = []
        self.utilizations: list[float] = []
        """Share of the devices' peak, of the same steps."""
        self.steps_seen = 0
        self.last_loss: Tensor | float | None = None
        self.flops_per_token = self.attention_flops = 0.0
        """Operations of a token in linear layers, and of a sample in attention by its squared length."""
        self.constants: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trained, _ = trainable_parameter_counts(pl_module)
        if pl_module.device.type == "cuda" and peak_flops(torch.cuda.get_device_name()) is not None:
            model = cast(PreTrainedModel, pl_module.model)
            self.flops_per_token, self.attention_flops = linear_flops_per_token(model), attention_flops(model)
        self.constants = {"trainable_parameters": trained} | rank_and_alpha(pl_module)
        self.step_started = Instant(pl_module.device)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.was_validated = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.was_validated:  # the work of other callbacks at the validation is no part of the step either
            self.step_started, self.was_validated = Instant(pl_module.device), False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.step_tokens += batch.num_tokens
        self.step_rows += batch.origins
        if self.attention_flops:
            self.step_squares = self.step_squares + squared_lengths(batch)
        if is_accumulating(trainer):
            return
        now = Instant(pl_module.device)
        began, tokens, squares = self.step_started, self.step_tokens, self.step_squares
        self.step_started, self.step_tokens, self.step_squares = now, 0, 0.0
        row = dict(pl_module.step_metrics)  # type: ignore[arg-type]
        groups = trainer.optimizers[0].param_groups
        row["lr"] = groups[0]["lr"]
        if len(groups) > 1:
            row |= {f"lr/{group['name']}": group["lr"] for group in groups}
        row |= {"tokens": tokens, "epoch": epochs_done(trainer)} | self.constants
        row |= {BEGAN: began, ENDED: now, SQUARES: squares, ROWS: self.step_rows}
        self.step_rows = []
        self.last_loss = row["loss"]
        self.pending.append((trainer.global_step, row))
        if len(self.pending) >= trainer.log_every_n_steps:  # type: ignore[attr-defined]
            self.flush(trainer, pl_module)

    def flush(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the pending values back from the device and hand them to the loggers. Raises Diverged."""
        pending, self.pending = self.pending, []
        if not pending:
            return
        device = trainer.strategy.root_device
        counts = torch.tensor([row["tokens"] for _, row in pending], dtype=torch.float64, device=device)
        peak = worst(peak_memory_gib(device))
        for (step, row), tokens in zip(pending, reduce_sums(counts).tolist(), strict=True):
            row["tokens"] = int(tokens)
            self.total_tokens += row["tokens"]
            row["total_tokens"] = self.total_tokens
            self.steps_seen += 1
            began, ended, rows = row.pop(BEGAN), row.pop(ENDED), row.pop(ROWS)
            values = {k: v.item() if isinstance(v, Tensor) else v for k, v in row.items()}
            squares = values.pop(SQUARES)
            seconds = values["step_seconds"] = ended.seconds_since(
                began
            )  # the device has passed both: a value was read
            if self.steps_seen > WARM_UP_STEPS:
                self.durations.append((seconds, row["tokens"]))
            values["tokens_per_second"] = values["tokens"] / values["step_seconds"]
            values["supervised_tokens_per_second"] = values["supervised_tokens"] / values["step_seconds"]
            if self.flops_per_token:
                # Attention is this rank's, the tokens are all ranks': the others' samples are taken to be as long.
                ranks = trainer.world_size
                flops = self.flops_per_token * values["tokens"] + self.attention_flops * squares * ranks
                values["mfu"] = model_flops_utilization(flops, seconds, ranks)
                if self.steps_seen > WARM_UP_STEPS and values["mfu"] is not None:
                    self.utilizations.append(values["mfu"])
            values["peak_memory_gib"] = peak
            for logger in trainer.loggers:
                logger.log_metrics(values, step)
            if self.guard is not None:
                self.guard.look(step, values, pl_module, partial(of_all, rows))
        if self.guard is not None and self.guard.is_no_op_due(trainer.global_step):
            self.guard.look_at_changes(trainer.global_step, changes_alone(pl_module))

    def is_calm(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Return whether the step that ends is no part of a loss that explodes. Raises Diverged as `flush` does."""
        self.flush(trainer, pl_module)
        return self.guard is None or self.guard.is_calm

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.flush(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.flush(trainer, pl_module)
        if self.guard is not None:
            checkpoint["guard"] = self.guard.state_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.guard is not None:
            self.guard.load_state_dict(checkpoint.get("guard", {}))

    def state_dict(self) -> dict[str, Any]:
        # Lightning asks before the rows of this step are flushed.
        pending = torch.tensor(float(sum(row["tokens"] for _, row in self.pending)), dtype=torch.float64)
        return {"loss": self.loss, "total_tokens": self.total_tokens + int(reduce_sums(pending))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_loss = state_dict["loss"]
        self.total_tokens = state_dict.get("total_tokens", 0)

    @property
    def loss(self) -> float | None:
        """Return the loss of the last optimiser step, per supervised token over all ranks."""
        return None if self.last_loss is None else float(self.last_loss)

    def tokens_per_second(self) -> float | None:
        """Return the median over the steps after the warm-up, real tokens over all ranks; None when there were none."""
        if not self.durations:
            return None
        return statistics.median(tokens / seconds for seconds, tokens in self.durations)

    def utilization(self) -> float | None:
        """Return the median share of the devices' peak over the same steps; None where the peak is not known."""
        return statistics.median(self.utilizations) if self.utilizations else None

    def tokens_of_a_step(self) -> float:
        """Return the median number of tokens over all ranks, of the same steps; 0 without any."""
        return float(statistics.median(tokens for _, tokens in self.durations)) if self.durations else 0.0
