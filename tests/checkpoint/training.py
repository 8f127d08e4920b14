"""A tiny real training run under Lightning's Trainer, shared by the checkpoint tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.checkpoint.resume import (
    AtomicCheckpointIO,
    checkpoint_path,
    load_trainable_state,
    trainable_state_dict,
)
from lightning_peft.models.tiny import tiny_model


class TinyFinetune(LightningModule):
    """LoRA on the tiny model, with the two overrides that AtomicCheckpointIO asks for."""

    def __init__(self, rank: int = 4, dropout: float = 0.0):
        super().__init__()
        self.model = tiny_model()
        torch.manual_seed(5)
        inject_adapters(self.model, LoRAConfig(rank=rank, dropout=dropout))

    def training_step(self, input_ids: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=input_ids, labels=input_ids).loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=50)]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return trainable_state_dict(self.model)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        load_trainable_state(self.model, state_dict)


class SaveEachStep(Callback):
    def __init__(self, folder: Path, after: Callable[[int], None] = lambda step: None):
        self.folder = folder
        self.after = after

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        trainer.save_checkpoint(checkpoint_path(self.folder, trainer.global_step))
        self.after(trainer.global_step)


def batches() -> StatefulDataLoader:
    rows = torch.randint(0, 300, (40, 16), generator=torch.Generator().manual_seed(1))
    return StatefulDataLoader(rows, batch_size=2)


def trainer(folder: Path, steps: int, keep_last: int | None = None, callbacks: list[Callback] | None = None) -> Trainer:
    return Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO(keep_last)],
        callbacks=[SaveEachStep(folder)] if callbacks is None else callbacks,
        default_root_dir=folder,
    )
