"""The options of a training that belong to no model, method or data; importing them imports no library."""

from dataclasses import dataclass, field
from enum import Enum


class StrategyKind(Enum):
    single = "single"
    """One process, one device."""
    ddp = "ddp"
    """Every rank holds the model; the gradients of what trains are averaged."""
    fsdp = "fsdp"
    """Every rank holds a slice of each block and gathers one block at a time (FSDP2)."""


@dataclass
class StrategyConfig:
    kind: StrategyKind = StrategyKind.single
    """Way in which ranks share the work: single, ddp or fsdp."""
    cpu_offload: bool = False
    """fsdp on GPUs: slices, gradients and optimiser states stay in host memory; each block visits the device."""
    tensor_parallel: int = 1
    """Ranks that share each matrix product; only 1 is supported, all ranks share the data."""

    def __post_init__(self) -> None:
        if self.cpu_offload and self.kind is not StrategyKind.fsdp:
            raise ValueError(
                f"strategy.cpu_offload=true strategy={self.kind.name}: only slices are moved; use strategy=fsdp with it"
            )
        if self.tensor_parallel != 1:
            raise ValueError(
                f"strategy.tensor_parallel={self.tensor_parallel}: adapters and 4-bit codes are not cut along a "
                "product; use 1, and strategy=fsdp for a model that no single device holds"
            )


@dataclass
class CheckpointConfig:
    """The times at which resumable state is written."""

    every_n_steps: int | None = 25
    """Optimiser steps between checkpoints; null writes none."""
    keep_last: int = 2
    """Checkpoints kept; older ones are removed once a newer one has been verified."""

    asynchronous: bool = False
    """Train on while a thread writes, from a copy in host memory."""
    best_by: str = "validation_loss"
    """Metric that adapter_best/ is the best by: validation_loss, validation_loss/SOURCE of a mixture, or one of
    validation.metrics; -NAME where large is good."""

    def __post_init__(self) -> None:
        if self.every_n_steps is not None and self.every_n_steps < 1:
            raise ValueError(f"checkpoint.every_n_steps={self.every_n_steps}: must be at least 1, or null for none")
        if self.keep_last < 1:
            raise ValueError(f"checkpoint.keep_last={self.keep_last}: must be at least 1")


@dataclass
class ValidationConfig:
    """The times in training, besides its end, at which the validation loss and metrics are taken."""

    every_n_steps: int | None = None
    """Optimiser steps between validations; null for the end only."""
    at_steps: list[int] = field(default_factory=list)
    """Further optimiser steps after which a validation takes place, such as the rungs of a pruned sweep."""
    samples: int = 2
    """Answers written to samples.jsonl at each validation during training."""
    metrics: list[str] = field(default_factory=list)
    """Metrics of generated answers: a task's metric, a task for all of its own, or module:function of one's own."""
    metric_rows: int = 64
    """Validation rows that are answered for the metrics, evenly spaced and the same each time."""
    max_new_tokens: int | None = None
    """Longest answer for the metrics, in tokens; null takes what their task says."""
    budget: float | None = 0.2
    """Share of the time of training that scoring the metrics may take; a validation beyond it scores none; null for no
    limit."""

    def __post_init__(self) -> None:
        if self.every_n_steps is not None and self.every_n_steps < 1:
            raise ValueError(f"validation.every_n_steps={self.every_n_steps}: must be at least 1, or null")
        if wrong := [step for step in self.at_steps if step < 1]:
            raise ValueError(f"validation.at_steps={wrong}: must be at least 1")
        if self.samples < 0:
            raise ValueError(f"validation.samples={self.samples}: must be 0 or more")
        if self.metric_rows < 1:
            raise ValueError(f"validation.metric_rows={self.metric_rows}: must be at least 1")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"validation.max_new_tokens={self.max_new_tokens}: must be at least 1, or null")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ValueError(f"validation.budget={self.budget}: must be above 0 and at most 1, or null for no limit")


@dataclass
class EarlyStoppingConfig:
    """The rule by which a run ends before its last step because it gets no better."""

    metric: str | None = None
    """validation_loss, validation_loss/SOURCE of a mixture, or one of validation.metrics; -NAME where large is good;
    null trains to the end."""
    patience: int = 3
    """Validations in a row that are no better than the best one before the run ends."""
    min_delta: float = 0.0
    """Margin by which a validation has to be better than the best one to count."""

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"early_stopping.patience={self.patience}: must be at least 1")
        if not self.min_delta >= 0:
            raise ValueError(f"early_stopping.min_delta={self.min_delta}: must be 0 or more")


class GuardAction(Enum):
    stop = "stop"
    """End the run as diverged; checkpoints and the best adapter of before stay."""
    rollback = "rollback"
    """Go back to the last good checkpoint and on from there at a lower learning rate."""
    skip = "skip"
    """Leave a step that is not finite out, and end the run as diverged after `patience` of them in a row."""
    none = "none"
    """Go on."""


@dataclass
class GuardConfig:
    """The rule by which a run counts as diverged, and what follows."""

    action: GuardAction = GuardAction.stop
    """stop ends the run as diverged, with exit status 3; rollback goes back to the last good checkpoint and on at a
    lower rate; skip leaves a step that is not finite out, and stops for the rest; none goes on whatever the loss is."""
    factor: float | None = 10.0
    """Times the median of the last hundred losses that a loss may be; null looks at finiteness alone."""
    patience: int = 20
    """Steps in a row above that before the run counts as diverged; with skip also steps in a row that are left out."""
    no_op_steps: int | None = 50
    """Optimiser steps after which an adapter that still changes no layer counts as diverged; null for never."""
    lr_factor: float = 0.5
    """Factor by which a rollback multiplies the learning rate, once more at each."""
    max_rollbacks: int = 3
    """Rollbacks of a run, over all its starts, before it ends as diverged."""

    def __post_init__(self) -> None:
        if self.factor is not None and not self.factor > 1:
            raise ValueError(f"guard.factor={self.factor}: must be above 1, or null")
        if self.patience < 1:
            raise ValueError(f"guard.patience={self.patience}: must be at least 1")
        if self.no_op_steps is not None and self.no_op_steps < 1:
            raise ValueError(f"guard.no_op_steps={self.no_op_steps}: must be at least 1, or null")
        if not 0 < self.lr_factor < 1:
            raise ValueError(f"guard.lr_factor={self.lr_factor}: must be above 0 and below 1")
        if self.max_rollbacks < 1:
            raise ValueError(f"guard.max_rollbacks={self.max_rollbacks}: must be at least 1")


@dataclass
class HealthConfig:
    """The measurements of the adapter itself while it trains."""

    every_n_steps: int | None = 100
    """Optimiser steps between measurements of every adapted layer: ||dW|| / ||W||, stable rank, and B's share of the
    gradient, as columns of metrics.csv; null for none."""

    def __post_init__(self) -> None:
        if self.every_n_steps is not None and self.every_n_steps < 1:
            raise ValueError(f"health.every_n_steps={self.every_n_steps}: must be at least 1, or null")


class ActivationCheckpointing(Enum):
    auto = "auto"
    """Whichever of none, elementwise, selective and blocks recomputes least and is estimated to fit the device."""
    none = "none"
    elementwise = "elementwise"
    """Recompute activation functions, norms and products of elements, and no matrix product. The compiler, where there
    is one, chooses by itself."""
    blocks = "blocks"
    """Keep each block's input, recompute the rest."""
    selective = "selective"
    """Keep the outputs of attention, whose cost grows with the square of the length, and recompute the rest."""
    offload = "offload"
    """Like blocks, with the kept inputs in host memory."""


class Compilation(Enum):
    auto = "auto"
    """blocks on CUDA, none elsewhere and with activation_checkpointing=offload."""
    none = "none"
    blocks = "blocks"
    """Each transformer block by itself; equal blocks share one compilation."""
    full = "full"
    """The decoder in one piece: compiles longer, fuses across blocks."""


def check_compilation(requested: Compilation, checkpointing: ActivationCheckpointing) -> None:
    """Raise ValueError for what the compiler cannot follow."""
    if checkpointing is ActivationCheckpointing.offload and requested in (Compilation.blocks, Compilation.full):
        raise ValueError(
            f"compile={requested.name} activation_checkpointing=offload: the compiler does not follow the copies to "
            "the host; use compile=none, or activation_checkpointing=blocks"
        )
