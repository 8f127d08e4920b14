"""The times at which the validation loss is taken during training."""

from lightning.pytorch import Callback, LightningModule, Trainer
from tiny_runs import tiny_config

from lightning_peft.commands.train import train


class ValidatedAfter(Callback):
    """Keeps (optimiser steps, micro batches) done before each validation during training."""

    seen: list[tuple[int, int]] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.seen.append((trainer.global_step, trainer.fit_loop.epoch_loop.total_batch_idx + 1))


def test_validation_falls_on_optimiser_steps(tmp_path):
    """Five micro batches an epoch in windows of three: the windows of three epochs end at 3, 5, 8, 10, 13 and 15."""
    config = tiny_config(
        tmp_path / "run", "data.max_rows=5", "data.packing=false", "trainer.accumulate_grad_batches=3",
        "trainer.max_epochs=3", "validation.every_n_steps=2", "validation.samples=0",
    )  # fmt: skip
    config.callbacks = {"probe": {"_target_": f"{__name__}.ValidatedAfter"}}
    ValidatedAfter.seen.clear()

    train(config)

    assert ValidatedAfter.seen == [(2, 5), (4, 10), (6, 15)]
