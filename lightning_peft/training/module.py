"""The Lightning module that trains an adapted model: its steps, validation, optimiser and checkpoints."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from lightning_peft.adapters.base import AdapterConfig, StepSchedule
from lightning_peft.adapters.inject import regularization, step_schedule, trained_in_full
from lightning_peft.checkpoint.resume import load_trainable_state, trainable_state_dict
from lightning_peft.compat import clip_unscaled_gradients, is_accumulating
from lightning_peft.data.batch import Batch
from lightning_peft.data.restored_progress import adjust_progress
from lightning_peft.models.source import ModelConfig
from lightning_peft.objectives.objective import ObjectiveConfig
from lightning_peft.optim.left_out import leave_out_if
from lightning_peft.optim.optimizers import OptimizerConfig, build_optimizer, optimizer_state_bytes
from lightning_peft.optim.schedules import ScheduleConfig, build_schedule, set_rates
from lightning_peft.optim.sharded import drop_gradients, hand_over_gradients, local
from lightning_peft.quantization.config import QuantizationConfig
from lightning_peft.quantization.experts import has_experts, routed_modules
from lightning_peft.quantization.quantize import bits_per_parameter, memory_by_group
from lightning_peft.training.adapted_module import AdaptedModule
from lightning_peft.training.callbacks.step_metrics import StepMetrics
from lightning_peft.training.config import ActivationCheckpointing, Compilation
from lightning_peft.training.host_memory import keep_freed_memory
from lightning_peft.training.router_load import RouterLoad
from lightning_peft.training.token_scaling import TokenWindow, divisor, scale_gradients

logger = logging.getLogger(__name__)

GRADIENT_UNIT = 1024.0
"""Tokens the summed loss is divided by during accumulation: a constant that keeps fp16 gradients in range."""


class FinetuneModule(AdaptedModule):
    """Fine-tunes a causal language model with adapters on a base that may be quantised.

    Loss and gradients are means per supervised token, or per pair of answers, over the whole accumulation window and
    all ranks. Only trainable parameters are in its state dict. Use it with a Trainer that has
    `plugins=[ComputePrecision("bf16-true")]` or runs in fp32: Lightning's own half precision would cast the fp32
    adapters. `AdaptedModule` says what `compilation`, `packing` and `objective` are.
    """

    def __init__(
        self,
        model: ModelConfig,
        adapter: AdapterConfig,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        quantization: QuantizationConfig | None = None,
        activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.elementwise,
        compilation: Compilation = Compilation.none,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        packing: bool | str = "auto",
        objective: ObjectiveConfig | None = None,
    ):
        super().__init__(
            model, adapter, quantization, activation_checkpointing, compilation, dtype, seed, packing, objective
        )
        self.optimizer_config = optimizer
        self.schedule_config = schedule
        self.lr_factor = 1.0
        """Factor of the learning rate of all groups; below 1 after rollbacks of `training/guard.py`."""
        self.leaves_out_steps = False
        """True where a step whose loss or gradient is not finite changes nothing."""
        self.step_schedule: StepSchedule | None = None
        """The schedule that changes the adapters between steps, for methods that have one."""
        self.saved_schedule: dict[str, Any] | None = None
        self.window = TokenWindow()
        self.validation_window = TokenWindow()
        self.source_windows: dict[str, TokenWindow] = {}
        """Windows of each source of a mixture, in the validation that goes on."""
        self.router_load: RouterLoad | None = None
        """Counts the rows that experts are given; None for a model without, and under the compiler, which hooks cut."""
        self.step_metrics: dict[str, Tensor] = {}
        """Device scalars of the last optimiser step: loss, tokens (supervised), grad_norm, penalty of the adapters."""

    def on_fit_start(self) -> None:
        if routed_modules(self.model):
            if self.compilation is Compilation.none:
                self.router_load = self.router_load or RouterLoad(self.model)
            else:
                logger.info("the load of the experts is not logged under the compiler; compile=none logs it")
        elif has_experts(self.model):
            logger.info("the load of the experts is not logged: this model's are not given their choice of tokens")
        self.log_memory(self.model)

    def log_memory(self, model: PreTrainedModel) -> None:
        """Log this rank's bytes of weights by group and of optimiser state, and the bits of a quantised parameter."""
        trained = [local(p).numel() for p in model.parameters() if p.requires_grad]
        groups = memory_by_group(model)
        groups["optimiser"] = sum(optimizer_state_bytes(trained, self.optimizer_config.name))
        sizes = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in groups.items() if size)
        bits = f"; {bits_per_parameter(model):.3f} bits a quantised parameter" if self.quantization_config.is_on else ""
        logger.info("memory: %s%s", sizes, bits)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def on_train_start(self) -> None:
        if self.lr_factor != 1:  # the checkpoint's rate may be the one of before a rollback
            scheduler = self.trainer.lr_scheduler_configs[0].scheduler
            assert isinstance(scheduler, LambdaLR)
            set_rates(self.trainer.optimizers[0], scheduler)
        if self.device.type == "cpu":
            keep_freed_memory()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Random numbers are a function of the position, so a resumed run draws what an uninterrupted one would.
        position = self.trainer.fit_loop.epoch_loop.total_batch_idx * self.trainer.world_size + self.trainer.global_rank
        torch.manual_seed((self.seed << 32) + position)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert self.objective is not None
        if self.router_load is not None:
            self.router_load.start()
        loss = self.training_loss(batch)
        weight = self.objective.loss_weight(batch)
        penalty, measured = regularization(self.model), self.objective.measured
        if self.router_load is not None:
            measured = measured | self.router_load.measured()
        if penalty is not None:
            measured = measured | {"penalty": (penalty.detach() * weight, loss.new_tensor(weight))}
        self.window.add(loss, weight, batch.loss_weight, measured)
        if penalty is not None:
            loss = loss + penalty * weight
        # Undo Lightning's division; the true divisor, the window's token count, is known when the window closes.
        return loss * (self.trainer.accumulate_grad_batches / GRADIENT_UNIT)

    def training_loss(self, batch: Batch) -> Tensor:
        """Return the loss summed over a micro batch, through which gradients reach what trains."""
        assert self.objective is not None
        loss: Tensor = self.objective(batch)
        return loss

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.step_metrics |= getattr(self.trainer.optimizers[0], "measured", {})
        if self.step_schedule is not None:
            self.step_schedule.after_step(self.trainer.global_step + 1)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        means = self.window.close()
        # DDP and FSDP average gradients over ranks, so the sum needs the world size back.
        factor = GRADIENT_UNIT * self.trainer.world_size / divisor(means.weight)
        scale_gradients(self.trainable_parameters(), factor)
        self.step_metrics = {"loss": means.loss, "supervised_tokens": means.tokens} | means.measured
        assert self.objective is not None
        self.objective.after_step(means.measured)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if gradient_clip_algorithm not in (None, "norm"):
            raise ValueError(f"gradient_clip_algorithm={gradient_clip_algorithm!r}: only norm is supported")
        limit = gradient_clip_val or float("inf")
        norm = nn.utils.clip_grad_norm_(self.trainable_parameters(), limit)
        self.step_metrics["grad_norm"] = norm.full_tensor() if isinstance(norm, DTensor) else norm
        hand_over_gradients(optimizer)
        if self.leaves_out_steps:
            self.leave_out_if_wrong(optimizer)

    def leave_out_if_wrong(self, optimizer: Optimizer) -> None:
        """Have the step change nothing where its loss or gradient is not finite: the same on every rank."""
        norm, loss = self.step_metrics["grad_norm"], self.step_metrics["loss"]
        is_wrong = ~(norm.isfinite() & loss.to(norm.device).isfinite())
        leave_out_if(is_wrong, optimizer)
        if self.step_schedule is not None:  # it reads the gradients after the step
            for parameter in self.trainable_parameters():
                if parameter.grad is not None:
                    gradient = local(parameter.grad)
                    gradient.masked_fill_(is_wrong.to(gradient.device), 0.0)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        drop_gradients(optimizer)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the step for a Trainer that is not of the command line: there `StepMetrics` does, with more beside it."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        if is_accumulating(self.trainer) or any(isinstance(callback, StepMetrics) for callback in callbacks):
            return
        has_bar = self.trainer.progress_bar_callback is not None  # values for the bar are read back at every step
        for name, value in self.step_metrics.items():  # means over all ranks already
            self.log(name, value.float(), prog_bar=has_bar and name == "loss", batch_size=1)

    def on_train_end(self) -> None:
        self.check_base()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert self.objective is not None
        loss = self.objective(batch)
        weight = self.objective.loss_weight(batch)
        self.validation_window.add(loss, weight, batch.loss_weight, self.objective.measured)
        if batch.source is not None:
            # Every rank adds to the window of every source, as all of them close each.
            for name in batch.source.names:
                is_of_it = name == batch.source.name
                window = self.source_windows.setdefault(name, TokenWindow())
                window.add(loss if is_of_it else torch.zeros_like(loss), weight * is_of_it)

    def on_validation_epoch_end(self) -> None:
        means = self.validation_window.close()
        # Lightning would log under a step count that it advances only after the validation.
        self.log("step", float(self.trainer.global_step), batch_size=1, sync_dist=True)
        self.log("validation_loss", means.loss.float(), prog_bar=True, batch_size=1, sync_dist=True)
        for name, mean in means.measured.items():
            self.log(f"validation_{name}", mean.float(), batch_size=1, sync_dist=True)
        for name, window in self.source_windows.items():
            self.log(f"validation_loss/{name}", window.close().loss.float(), batch_size=1, sync_dist=True)
        self.source_windows = {}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        optimizer = build_optimizer(named, self.optimizer_config, trained_in_full(self.model))
        clip_unscaled_gradients(optimizer)
        total_steps = int(self.trainer.estimated_stepping_batches)
        scheduler = build_schedule(optimizer, self.schedule_config, total_steps, self.lr_factor)
        self.step_schedule = step_schedule(self.model, self.adapter_config, total_steps)
        if self.step_schedule is not None and self.saved_schedule is not None:
            self.step_schedule.load_state_dict(self.saved_schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return trainable_state_dict(self.model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        adjust_progress(checkpoint, self.trainer.world_size)
        assert self.objective is not None
        self.objective.load_step_state(move_data_to_device(checkpoint.get("objective", {}), self.device))
        saved, own = checkpoint.get("selection"), self.selection
        if saved is not None and (own is None or saved["chosen"] != own.chosen):
            raise ValueError("checkpoint: other modules were trained in full; set `selection` to those that it holds")
        self.saved_schedule = checkpoint.get("step_schedule")
        if self.step_schedule is not None and self.saved_schedule is not None:
            self.step_schedule.load_state_dict(self.saved_schedule)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_base()
        if self.objective is not None and (state := self.objective.step_state()):
            checkpoint["objective"] = state
        if self.selection is not None:
            checkpoint["selection"] = dict(vars(self.selection))
        if self.step_schedule is not None:
            checkpoint["step_schedule"] = self.step_schedule.state_dict()

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        load_trainable_state(self.model, state_dict)
