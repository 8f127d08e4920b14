"""The Lightning module: what a step computes, however the batch was cut."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from tiny_runs import plain_trainer, tiny_config, tiny_parts

from lightning_peft.adapters.inject import adapters
from lightning_peft.checkpoint.resume import trainable_state_dict
from lightning_peft.commands.train import train
from lightning_peft.tracking.metrics_csv import MetricsCSV
from lightning_peft.training.precision import ComputePrecision


def weights_after(tmp_path, steps, accumulate, micro_batch_size, **options):
    config = tiny_config(
        tmp_path,
        f"trainer.accumulate_grad_batches={accumulate}",
        f"data.micro_batch_size={micro_batch_size}",
        "data.packing=false",
    )
    module, data = tiny_parts(config)
    plain_trainer(max_steps=steps, accumulate_grad_batches=accumulate, **options).fit(module, datamodule=data)
    return trainable_state_dict(module.model)


def test_first_step_moves_along_the_gradient_of_the_token_mean(tmp_path):
    """One window of four micro batches is held against torch's own cross entropy over all their tokens at once."""
    config = tiny_config(tmp_path, "trainer.accumulate_grad_batches=4", "data.packing=false")
    module, data = tiny_parts(config)
    seen = []
    gradients = {}

    def keep_batch(batch, batch_idx):
        seen.append(batch)

    def keep_gradients(optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        gradients.update({n: p.grad.clone() for n, p in module.model.named_parameters() if p.requires_grad})

    module.on_train_batch_end = lambda outputs, batch, batch_idx: keep_batch(batch, batch_idx)
    module.configure_gradient_clipping = keep_gradients
    plain_trainer(max_steps=1, accumulate_grad_batches=4).fit(module, datamodule=data)

    reference, _ = tiny_parts(config)
    reference.configure_model()
    total, tokens = 0.0, 0
    for batch in seen:
        logits = reference.model(input_ids=batch.input_ids).logits[:, :-1].flatten(0, 1)
        labels = batch.labels[:, 1:].flatten()
        total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
        tokens += int((labels != -100).sum())
    (total / tokens).backward()
    expected = {n: p.grad for n, p in reference.model.named_parameters() if p.requires_grad}
    assert len(seen) == 4 and len({b.num_supervised for b in seen}) > 1
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_anyones_trainer_is_told_the_losses_of_training(tmp_path, accumulate):
    """Lightning's own logger gets, step by step, what the command writes into metrics.csv of the same run."""
    words = (f"trainer.accumulate_grad_batches={accumulate}", "trainer.max_steps=3")
    config = tiny_config(tmp_path / "command", *words)
    train(config)
    module, data = tiny_parts(config)
    options = {
        "plugins": [ComputePrecision("32-true")], "use_distributed_sampler": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "num_sanity_val_steps": 0,
    }  # fmt: skip
    trainer = Trainer(
        **options, logger=CSVLogger(tmp_path, "own", "0"), max_steps=3, log_every_n_steps=1,
        accumulate_grad_batches=accumulate, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    for key in ("loss", "grad_norm", "supervised_tokens"):
        ours, theirs = (
            [float(row[key]) for row in MetricsCSV(str(tmp_path / folder)).read()[1] if row[key]]
            for folder in ("command", "own/0")
        )
        assert len(ours) == len(theirs) == 3 and theirs == pytest.approx(ours, rel=1e-5), key
    assert "loss" in trainer.callback_metrics
    assert not trainer.progress_bar_metrics  # there is no bar, whose values are waited for at every step


def test_loss_is_in_the_bar_of_anyones_trainer(tmp_path):
    module, data = tiny_parts(tiny_config(tmp_path))
    trainer = Trainer(
        plugins=[ComputePrecision("32-true")], use_distributed_sampler=False, enable_checkpointing=False, logger=False,
        enable_model_summary=False, accelerator="cpu", num_sanity_val_steps=0, max_steps=1,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert "loss" in trainer.progress_bar_metrics


def test_only_adapters_are_in_the_state_dict(tmp_path):
    module, _ = tiny_parts(tiny_config(tmp_path))
    module.configure_model()
    assert set(module.state_dict()) == {n for n, p in module.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in module.state_dict())


def test_adapters_stay_fp32_on_a_bf16_base(tmp_path):
    module, data = tiny_parts(tiny_config(tmp_path))
    module.weight_dtype = torch.bfloat16
    plain_trainer(max_steps=2).fit(module, datamodule=data)
    dtypes = {p.requires_grad: p.dtype for p in module.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


def test_half_precision_of_lightning_is_refused(tmp_path):
    module, data = tiny_parts(tiny_config(tmp_path))
    trainer = Trainer(
        accelerator="cpu", precision="bf16-true", max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"would cast the fp32 adapters.*ComputePrecision"):
        trainer.fit(module, datamodule=data)


def test_dropout_is_active_in_training(tmp_path):
    config = tiny_config(tmp_path, "adapter.dropout=0.5")
    module, _ = tiny_parts(config)
    module.configure_model()
    assert all(layer.training for _, layer in adapters(module.model))


@pytest.mark.parametrize("mode", ["elementwise", "blocks", "selective", "offload"])
def test_activation_checkpointing_changes_no_weight(tmp_path, mode):
    from lightning_peft.training.activation_checkpointing import ActivationCheckpointing

    results = []
    for checkpointing in (ActivationCheckpointing.none, ActivationCheckpointing[mode]):
        module, data = tiny_parts(tiny_config(tmp_path))
        module.activation_checkpointing = checkpointing
        plain_trainer(max_steps=2).fit(module, datamodule=data)
        results.append(trainable_state_dict(module.model))
    # The same operations in the same order: recomputation is exact on one device.
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
