"""No step waits for the device: its numbers are read back every `trainer.log_every_n_steps`, and then at once."""

from contextlib import suppress

import pytest
import torch
from host_syncs import HostSyncs
from lightning.pytorch import Callback
from tiny_runs import plain_trainer, tiny_config, tiny_parts

from lightning_peft.commands.train import train
from lightning_peft.training.callbacks import training_progress

WATCHED = [
    "+callbacks.audit._target_=host_syncs.HostSyncs",
    "trainer.log_every_n_steps=10",
    "trainer.max_steps=5",
    "trainer.accumulate_grad_batches=2",
    "checkpoint.every_n_steps=null",
]


METHODS = ["lora", "dora", "qlora", "adalora", "lora_plus", "intrinsic", "full"]


@pytest.mark.parametrize(
    "words",
    [
        *([f"method={name}"] for name in METHODS),
        ["optimizer=adamw_8bit"],
        ["optimizer=paged_adamw_8bit"],
        ["guard.action=skip"],
        ["guard.action=skip", "method=adalora"],
        ["guard.action=rollback"],
    ],
    ids=" ".join,
)
def test_no_step_waits_for_the_device(words, tmp_path, monkeypatch):
    monkeypatch.setattr(training_progress, "SECONDS_BETWEEN_LINES", float("inf"))
    train(tiny_config(tmp_path / "run", *WATCHED, *words))
    assert HostSyncs.micro_batches == 6
    assert HostSyncs.found == [], "\n".join(HostSyncs.found)


def wait_in_vain():
    """Call what a CPU build refuses: the call is what counts."""
    with suppress(AssertionError, RuntimeError):
        torch.cuda.synchronize()


CULPRITS = {
    "item": lambda loss: loss.item(),
    "float": float,
    "bool": lambda loss: bool(loss > 0),
    "int": int,
    "tolist": lambda loss: loss.tolist(),
    "cpu": lambda loss: loss.cpu(),
    "numpy": lambda loss: loss.detach().numpy(),
    "nonzero": lambda loss: torch.ones(3).nonzero(),
    "mask": lambda loss: torch.ones(3)[torch.ones(3) > 0],
    "masked write": lambda loss: torch.ones(3).__setitem__(torch.ones(3) > 0, torch.ones(3)),
    "equal": lambda loss: torch.equal(loss, loss),
    "if": lambda loss: 1 if loss > 0 else 2,
    "synchronize": lambda loss: torch.cuda.synchronize() if torch.cuda.is_available() else wait_in_vain(),
}


@pytest.mark.parametrize("culprit", CULPRITS)
def test_the_watch_names_who_waits(culprit, tmp_path):
    class Waits(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                CULPRITS[culprit](outputs["loss"])

    module, data = tiny_parts(tiny_config(tmp_path))
    plain_trainer(max_steps=5, callbacks=[HostSyncs(), Waits()]).fit(module, datamodule=data)
    assert len(HostSyncs.found) == 1, "\n\n".join(HostSyncs.found)
    assert "test_host_syncs.py" in HostSyncs.found[0] and "on_train_batch_end" in HostSyncs.found[0]
