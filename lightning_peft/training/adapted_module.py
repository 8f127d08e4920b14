"""The Lightning module of an adapted model: how it is loaded, quantised, given adapters and its loss, and sharded."""

import logging
from collections.abc import Iterator

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import HalfPrecision
from transformers import PreTrainedModel

from lightning_peft.adapters.base import AdapterConfig
from lightning_peft.adapters.inject import Injection
from lightning_peft.adapters.method import Selection
from lightning_peft.adapters.registry import METHODS
from lightning_peft.adapters.shared_input import adapt_together
from lightning_peft.checkpoint.peft_format import adapter_config_from_peft, load_adapter
from lightning_peft.checkpoint.peft_words import AdapterFileError
from lightning_peft.distributed import worst
from lightning_peft.inference.load import adapter_folder
from lightning_peft.models.blocks import decoder_of, transformer_blocks
from lightning_peft.models.loading import load_by_block, model_name
from lightning_peft.models.reward_head import REWARD_HEAD
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.twin import copy_around_same_tensors
from lightning_peft.objectives.model_loss import ModelLoss
from lightning_peft.objectives.objective import ObjectiveConfig
from lightning_peft.objectives.reference import ReferencedLoss, starts_as_base
from lightning_peft.objectives.registry import OBJECTIVES
from lightning_peft.objectives.sft import SFTConfig
from lightning_peft.objectives.teacher import TaughtConfig, TaughtLoss
from lightning_peft.progress import Part
from lightning_peft.quantization.config import QuantizationConfig
from lightning_peft.quantization.quantize import (
    combined_fingerprint,
    dequantize_modules,
    layer_fingerprints,
    memory_by_group,
    weights_fingerprint,
)
from lightning_peft.training.activation_checkpointing import checkpoint_blocks
from lightning_peft.training.adapter_start import FirstBatches, chosen_in_full, reads_whole_model, start_adapters
from lightning_peft.training.callbacks.step_metrics import host_memory_gib
from lightning_peft.training.compilation import compile_model
from lightning_peft.training.config import ActivationCheckpointing, Compilation
from lightning_peft.training.host_memory import use_tensor_heap
from lightning_peft.training.strategies import ShardedModel
from lightning_peft.training.teacher import give_teacher, shares_base

logger = logging.getLogger(__name__)


class AdaptedModule(LightningModule):
    """Holds a causal language model with adapters on a base that may be quantised, and the loss it is trained on.

    The model exists once Lightning has called `configure_model`, in each rank. `compilation` is none, blocks or full;
    `packing` is `data.packing`: with true, a model that does not keep packed samples apart is refused. `objective` is
    what it is trained for, supervised fine-tuning where it is None.
    """

    def __init__(
        self,
        model: ModelConfig,
        adapter: AdapterConfig,
        quantization: QuantizationConfig | None,
        activation_checkpointing: ActivationCheckpointing,
        compilation: Compilation,
        dtype: torch.dtype,
        seed: int,
        packing: bool | str,
        objective: ObjectiveConfig | None,
    ):
        super().__init__()
        self.model_config = model
        self.adapter_config = adapter
        self.quantization_config = quantization or QuantizationConfig()
        self.activation_checkpointing = activation_checkpointing
        self.compilation = compilation
        self.weight_dtype = dtype
        self.seed = seed
        self.packing = packing
        self.objective_config = objective or SFTConfig()
        self.selection: Selection | None = None
        """The modules that a method has chosen to train in full; given before the model is made, they are taken."""
        self.objective: ModelLoss | None = None
        self.base_fingerprint: str | None = None
        """Hash of the quantised base as loaded, with quantization.verify."""

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
        if strategy is not None and strategy.root_device.type == "cpu":
            use_tensor_heap()
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
        has_twin = isinstance(own, TaughtConfig) and own.runs_teacher and shares_base(own)
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
            adapt_together(
                model, decoder_of(model), is_sharded=sharding is not None,
                # A twin's weights are the same tensors, and would be there twice.
                in_weights=self.compilation is not Compilation.none and not has_twin,
            )  # fmt: skip
        if self.quantization_config.verify:
            self.base_fingerprint = combined_fingerprint(layer_fingerprints(model) | fingerprints)
        if sharding is None:
            objective = self.build_objective(model.to(device))  # type: ignore[arg-type]  # as in load_model
            if isinstance(objective, TaughtLoss) and objective.config.runs_teacher:
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
