"""The Lightning module: a causal language model with adapters, its loss, its optimiser."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import HalfPrecision
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from lightning_peft.adapters.base import AdapterConfig, StepSchedule
from lightning_peft.adapters.inject import Injection, regularization, step_schedule, trained_in_full
from lightning_peft.adapters.method import Selection
from lightning_peft.adapters.registry import METHODS
from lightning_peft.adapters.shared_input import adapt_together
from lightning_peft.checkpoint.peft_format import adapter_config_from_peft, load_adapter
from lightning_peft.checkpoint.peft_words import AdapterFileError
from lightning_peft.checkpoint.resume import load_trainable_state, trainable_state_dict
from lightning_peft.compat import clip_unscaled_gradients, is_accumulating
from lightning_peft.data.batch import Batch
from lightning_peft.data.restored_progress import adjust_progress
from lightning_peft.distributed import worst
from lightning_peft.inference.load import adapter_folder
from lightning_peft.models.blocks import decoder_of, transformer_blocks
from lightning_peft.models.loading import load_by_block, model_name
from lightning_peft.models.reward_head import REWARD_HEAD
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.twin import copy_around_same_tensors
from lightning_peft.objectives.distill import DistillConfig, DistilledLoss
from lightning_peft.objectives.model_loss import ModelLoss
from lightning_peft.objectives.objective import ObjectiveConfig
from lightning_peft.objectives.reference import ReferencedLoss, starts_as_base
from lightning_peft.objectives.registry import OBJECTIVES
from lightning_peft.objectives.sft import SFTConfig
from lightning_peft.optim.left_out import leave_out_if
from lightning_peft.optim.optimizers import OptimizerConfig, build_optimizer, optimizer_state_bytes
from lightning_peft.optim.schedules import ScheduleConfig, build_schedule, set_rates
from lightning_peft.optim.sharded import drop_gradients, hand_over_gradients, local
from lightning_peft.progress import Part
from lightning_peft.quantization.config import QuantizationConfig
from lightning_peft.quantization.experts import has_experts, routed_modules
from lightning_peft.quantization.quantize import (
    bits_per_parameter,
    combined_fingerprint,
    dequantize_modules,
    layer_fingerprints,
    memory_by_group,
    weights_fingerprint,
)
from lightning_peft.training.activation_checkpointing import checkpoint_blocks
from lightning_peft.training.adapter_start import FirstBatches, chosen_in_full, reads_whole_model, start_adapters
from lightning_peft.training.callbacks.step_metrics import StepMetrics, host_memory_gib
from lightning_peft.training.compilation import compile_model
from lightning_peft.training.config import ActivationCheckpointing, Compilation
from lightning_peft.training.host_memory import keep_freed_memory
from lightning_peft.training.router_load import RouterLoad
from lightning_peft.training.strategies import ShardedModel
from lightning_peft.training.teacher import give_teacher, shares_base
from lightning_peft.training.token_scaling import TokenWindow, divisor, scale_gradients

GRADIENT_UNIT = 1024.0
"""Tokens the summed loss is divided by during accumulation: a constant that keeps fp16 gradients in range."""


logger = logging.getLogger(__name__)


class FinetuneModule(LightningModule):
    """Fine-tunes a causal language model with adapters on a base that may be quantised.

    Loss and gradients are means per supervised token, or per pair of answers, over the whole accumulation window and
    all ranks. Only trainable parameters are in its state dict. Use it with a Trainer that has
    `plugins=[ComputePrecision("bf16-true")]` or runs in fp32: Lightning's own half precision would cast the fp32
    adapters. `compilation` is none, blocks or full; `packing` is `data.packing`: with true, a model that does not keep
    packed samples apart is refused. `objective` is what it is trained for, supervised fine-tuning where it is None.
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
        super().__init__()
        self.model_config = model
        self.adapter_config = adapter
        self.optimizer_config = optimizer
        self.schedule_config = schedule
        self.quantization_config = quantization or QuantizationConfig()
        self.activation_checkpointing = activation_checkpointing
        self.compilation = compilation
        self.weight_dtype = dtype
        self.seed = seed
        self.packing = packing
        self.objective_config = objective or SFTConfig()
        self.lr_factor = 1.0
        """Factor of the learning rate of all groups; below 1 after rollbacks of `training/guard.py`."""
        self.leaves_out_steps = False
        """True where a step whose loss or gradient is not finite changes nothing."""
        self.step_schedule: StepSchedule | None = None
        """The schedule that changes the adapters between steps, for methods that have one."""
        self.saved_schedule: dict[str, Any] | None = None
        self.selection: Selection | None = None
        """The modules that a method has chosen to train in full; given before the model is made, they are taken."""
        self.objective: ModelLoss | None = None
        self.base_fingerprint: str | None = None
        """Hash of the quantised base as loaded, with quantization.verify."""
        self.window = TokenWindow()
        self.validation_window = TokenWindow()
        self.source_windows: dict[str, TokenWindow] = {}
        """Windows of each source of a mixture, in the validation that goes on."""
        self.router_load: RouterLoad | None = None
        """Counts the rows that experts are given; None for a model without, and under the compiler, which hooks cut."""
        self.step_metrics: dict[str, Tensor] = {}
        """Device scalars of the last optimiser step: loss, tokens (supervised), grad_norm, penalty of the adapters."""

    @property
    def model(self) -> PreTrainedModel:
        assert self.objective is not None, "the model exists after configure_model()"
        model = self.objective.model
        assert isinstance(model, PreTrainedModel)
        return model

    def configure_model(self) -> None:
        """Load, quantise and adapt the model. Lightning calls this once the ranks exist; a second call does nothing."""
        if self.objective is not None:
            return
        strategy = None if self._trainer is None else self.trainer.strategy
        if self._trainer is not None and isinstance(self.trainer.precision_plugin, HalfPrecision):
            raise ValueError(
                f"Trainer(precision={self.trainer.precision!r}) would cast the fp32 adapters: "
                'use plugins=[ComputePrecision("bf16-true")] instead'
            )
        sharding = strategy if isinstance(strategy, ShardedModel) else None
        self.objective = self.load(torch.device("cpu") if strategy is None else strategy.root_device, sharding)
        if self.quantization_config.verify:
            self.check_base()
            logger.info("quantization.verify: dequantised weights have fingerprint %s", self.base_fingerprint)
        if self.adapter_config.init_from is not None:
            folder = adapter_folder(self.adapter_config.init_from, "adapter.init_from")
            try:
                load_adapter(self.model, folder, may_lack=[f"{REWARD_HEAD}.weight"])
            except AdapterFileError as error:
                if (made_with := adapter_config_from_peft(folder).method) == self.adapter_config.method:
                    raise
                raise AdapterFileError(
                    f"adapter.init_from={self.adapter_config.init_from}: was made with method={made_with}, and "
                    f"{self.adapter_config.method} is asked for; leave method out ({error})"
                ) from error
        if isinstance(self.objective, ReferencedLoss) and not starts_as_base(self.adapter_config):
            logger.info(
                "objective=%s: the reference is a copy of what trains, as it is now", self.objective_config.name
            )
            self.objective.remember_start()
        if routed_modules(self.model):
            if self.compilation is Compilation.none:
                self.router_load = RouterLoad(self.model)
            else:
                logger.info("the load of the experts is not logged under the compiler; compile=none logs it")
        elif has_experts(self.model):
            logger.info("the load of the experts is not logged: this model's are not given their choice of tokens")
        self.log_memory(self.model)

    def read_base(self, device: torch.device) -> tuple[PreTrainedModel, Iterator[str]]:
        """Return the quantised base as `load_by_block` does."""
        return load_by_block(self.model_config, self.weight_dtype, self.quantization_config, device)

    def build_objective(self, model: PreTrainedModel) -> ModelLoss:
        """Return the model with the loss it is trained on."""
        row = OBJECTIVES[self.objective_config.name]
        return row.build(model, self.objective_config, self.packing).train()

    @property
    def first_batches(self) -> FirstBatches | None:
        """Return what gives the first batches of the training data; None without a Trainer that has data."""
        return getattr(getattr(self._trainer, "datamodule", None), "first_batches", None)

    def select_modules(self, model: PreTrainedModel, device: torch.device) -> None:
        """Find the modules trained in full, for methods that choose them, and make their weights dense."""
        if METHODS[self.adapter_config.method].select is None:
            return
        if self.selection is None:
            objective = self.build_objective(model).eval()
            sums_on = device if self._trainer is None else self.trainer.strategy.root_device
            self.selection = chosen_in_full(objective, self.adapter_config, self.first_batches, sums_on)
        self.adapter_config = self.selection.applied(self.adapter_config)
        dense = dequantize_modules(model, self.selection.chosen)
        found = f", {len(dense)} of them made dense" if dense else ""
        logger.info("%d of %d modules train in full%s", len(self.selection.chosen), len(self.selection.scores), found)

    def load(self, device: torch.device, sharding: ShardedModel | None) -> ModelLoss:
        """Return the model on `device` with its loss; each block is read, quantised and adapted before the next.

        Under FSDP a block is also cut to this rank's slice before the next is read.
        """
        own = self.objective_config
        has_teacher = isinstance(own, DistillConfig) and own.teacher_top_k is None
        has_twin = has_teacher and isinstance(own, DistillConfig) and shares_base(own)
        reads_all = reads_whole_model(self.adapter_config, self.quantization_config) or has_twin
        twin: PreTrainedModel | None = None
        if sharding is not None and reads_all:
            logger.info(
                "the adapters' init reads the whole model: every rank holds it on its host before it is sharded"
            )
            device = torch.device("cpu")
        host_memory = 0.0
        fingerprints: dict[str, str] = {}
        with Part(f"loading {model_name(self.model_config)}"):
            model, blocks = self.read_base(device)
            if (prepare := OBJECTIVES[self.objective_config.name].prepare) is not None:
                prepare(model, self.seed)
            if reads_all:
                blocks = iter(list(blocks))
                self.select_modules(model.to(device), device)  # type: ignore[arg-type]  # as in load_model
                twin = copy_around_same_tensors(model) if has_twin else None
            torch.manual_seed(self.seed)
            injection = Injection(model, self.adapter_config)
            if reads_all:
                injection.finish()
                start_adapters(
                    model, self.adapter_config, self.model_config, self.weight_dtype, self.quantization_config,
                    self.first_batches,
                )  # fmt: skip
            if sharding is not None:
                transformer_blocks(model)  # this says so where there are none
            checkpoint_blocks(model, self.activation_checkpointing)
            compile_model(model, self.compilation)
            for name in blocks:
                injection.adapt(name)
                block = model.get_submodule(name)
                if self.quantization_config.verify:
                    fingerprints |= layer_fingerprints(block, name)
                host_memory = max(host_memory, host_memory_gib())
                if sharding is not None:
                    sharding.shard_block(block)
            if not reads_all:
                injection.finish()
            adapt_together(model, decoder_of(model), is_sharded=sharding is not None)
        if self.quantization_config.verify:
            self.base_fingerprint = combined_fingerprint(layer_fingerprints(model) | fingerprints)
        if sharding is None:
            objective = self.build_objective(model.to(device))  # type: ignore[arg-type]  # as in load_model
            if has_teacher and isinstance(objective, DistilledLoss):
                give_teacher(
                    objective, twin, self.model_config, self.quantization_config, self.weight_dtype, device
                )  # fmt: skip
            return objective
        objective = self.build_objective(model)
        host_memory = max(host_memory, host_memory_gib())
        sharding.shard_root(objective)
        logger.info(
            "sharded over %d ranks: %.1f MiB on each; host memory at its peak while loading: %.2f GiB",
            sharding.world_size,
            sum(memory_by_group(model).values()) / 2**20,
            worst(host_memory),
        )
        return objective

    def check_base(self) -> None:
        """Raise RuntimeError, with quantization.verify, for a dequantised weight that is not as at the first call."""
        if not self.quantization_config.verify:
            return
        found = weights_fingerprint(self.model)
        if self.base_fingerprint is None:
            self.base_fingerprint = found
        if found != self.base_fingerprint:
            raise RuntimeError("quantization.verify: the dequantised weights are not those that were loaded")

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
        loss = self.objective(batch)
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
