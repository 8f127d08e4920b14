"""Measure every adapted layer at intervals, for the log, and say what looks wrong."""

import logging
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lightning_peft.compat import is_accumulating
from lightning_peft.distributed import reduce_sums
from lightning_peft.optim.sharded import local
from lightning_peft.tracking.loggers import RunLogger
from lightning_peft.training.config import HealthConfig
from lightning_peft.training.health import ChangeMeter, alarms_of, measured_layers

logger = logging.getLogger(__name__)

OUTER = ("lora_B", "lora_embedding_B", "vera_lambda_b")
"""Names of the factor that the change ends with."""


ENOUGH_STEPS = 50
"""Steps after which the end of a run says what looks wrong; before, few directions have had the time to grow. Ours."""


class AdapterHealth(Callback):
    """Puts `health/LAYER/change`, `/stable_rank` and `/gradient_B` into the row of every `every_n_steps`th step.

    change is ||dW|| / ||W||; gradient_B is B's share of the squared norm of the layer's gradient, A's is the rest. It
    comes before `StepMetrics` in the Trainer's callbacks. The host waits for the device at these steps alone. It
    measures once more at the end of a run of ENOUGH_STEPS.
    """

    def __init__(self, config: HealthConfig):
        self.every_n_steps = config.every_n_steps
        self.meter = ChangeMeter()
        self.told: list[str] = []
        """Kinds of alarms that were given: each is given once a run."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every_n_steps is None or is_accumulating(trainer) or trainer.global_step % self.every_n_steps:
            return
        model, root = cast(PreTrainedModel, pl_module.model), pl_module.objective
        assert isinstance(root, nn.Module)
        changes = self.meter.measure(model, root)
        found: dict[str, float] = {}
        for name, change in changes.items():
            found |= {f"health/{name}/change": change.relative_norm, f"health/{name}/stable_rank": change.stable_rank}
        found |= {f"health/{name}/gradient_B": share for name, share in gradient_shares(model).items()}
        pl_module.step_metrics |= found  # type: ignore[operator]
        for kind, text in alarms_of(changes).items():
            if kind not in self.told:
                self.told.append(kind)
                self.warn(trainer, kind, f"step {trainer.global_step}: {text}")

    def at_the_end(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """Return what looks wrong in the trained adapter, a sentence each. All ranks call it."""
        if self.every_n_steps is None or trainer.global_step < ENOUGH_STEPS:
            return []
        model, root = cast(PreTrainedModel, pl_module.model), pl_module.objective
        assert isinstance(root, nn.Module)
        found = alarms_of(self.meter.measure(model, root))
        for kind in found.keys() - set(self.told):
            self.alert(trainer, kind, f"step {trainer.global_step}: {found[kind]}")
        return list(found.values())

    def warn(self, trainer: Trainer, kind: str, text: str) -> None:
        if not trainer.is_global_zero:
            return
        logger.warning("%s", text)
        self.alert(trainer, kind, text)

    def alert(self, trainer: Trainer, kind: str, text: str) -> None:
        for run_logger in trainer.loggers:
            if isinstance(run_logger, RunLogger):
                run_logger.log_alert(kind, text)

    def state_dict(self) -> dict[str, Any]:
        return {"told": self.told}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.told = list(state_dict["told"])


def gradient_shares(model: nn.Module) -> dict[str, float]:
    """Return B's share of the squared norm of each layer's gradient, where it has two factors. All ranks call it."""
    sums: dict[str, Tensor] = {}
    is_sharded = False
    for name, layer in measured_layers(model):
        pieces: dict[bool, list[Tensor]] = {True: [], False: []}
        for key, parameter in layer.named_parameters():
            if parameter.grad is not None and not key.startswith("base_layer."):
                is_sharded = is_sharded or isinstance(parameter.grad, DTensor)
                pieces[key.startswith(OUTER)].append(local(parameter.grad).float().square().sum())
        if pieces[True] and pieces[False]:
            sums[name] = torch.stack([torch.stack(pieces[True]).sum(), torch.stack(pieces[False]).sum()])
    if not sums:
        return {}
    both = torch.stack(list(sums.values()))
    rows = (reduce_sums(both) if is_sharded else both).tolist()
    return {name: B / (A + B) for name, (B, A) in zip(sums, rows, strict=True) if A + B > 0}
