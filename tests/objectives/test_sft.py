"""The loss against the cross entropy of the model's own logits, over what families do to them."""

import logging

import pytest
import torch
import torch.nn.functional as F
from families import small_model

from lightning_peft.data.chat import Encoded
from lightning_peft.data.collate import collate
from lightning_peft.models.attention import accept_packed_batches, choose_attention
from lightning_peft.objectives.sft import SupervisedLoss

REBUILT = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.0625},
    "hyperclovax": {"logits_scaling": 0.25},
    "minicpm3": {"dim_model_base": 16},
    "nanochat": {"final_logit_softcapping": 3.0},
    "falcon_h1": {"lm_head_multiplier": 0.25},
    "recurrent_gemma": {"logits_soft_cap": 3.0, "block_types": ["recurrent", "attention"]},
    "llama4_text": {},
    "mpt": {"logit_scale": 0.25},
    "qwen3_next": {},
    "qwen3_5_text": {},
}
OWN = {"modernbert-decoder": {}, "roberta": {"is_decoder": True}}
"""Families with layers between decoder and head."""


def samples():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 90, (length,), generator=generator) for length in (23, 30, 14)]


def own_loss(model):
    logits = [model(input_ids=sample[None], use_cache=False).logits[0].float() for sample in samples()]
    return sum(
        F.cross_entropy(x[:-1], sample[1:], reduction="sum") for x, sample in zip(logits, samples(), strict=True)
    )


def objective_and_batch(family, **options):
    model = small_model(family, **options)
    if (attention := choose_attention(model.config, "auto")) is not None:
        model.set_attn_implementation(attention)
    accept_packed_batches(model)
    rows = [[Encoded(s.tolist(), [-100, *s[1:].tolist()], True)] for s in samples()]
    return SupervisedLoss(model), collate(rows, 0, 32, packing=False)


@pytest.mark.parametrize("family", [*REBUILT, *OWN])
def test_loss_is_that_of_the_models_own_logits(family, caplog):
    objective, batch = objective_and_batch(family, **(REBUILT | OWN)[family])
    with caplog.at_level(logging.WARNING), torch.no_grad():
        got, expected = objective(batch), own_loss(objective.model)
    # fp32; sums over 64 tokens taken in another order.
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=0)
    assert ("model's own logits" in caplog.text) is (family in OWN)


@pytest.mark.parametrize("family", ["gemma2", "hyperclovax", "minicpm3", "roberta"])
def test_gradients_are_those_of_the_models_own_logits(family):
    objective, batch = objective_and_batch(family, **(REBUILT | OWN)[family])
    weight = objective.model.get_input_embeddings().weight
    (got,) = torch.autograd.grad(objective(batch), weight)
    (expected,) = torch.autograd.grad(own_loss(objective.model), weight)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


@pytest.mark.parametrize("family", ["gemma2", "cohere", "minicpm3", "falcon_h1"])
def test_inference_mode_gives_the_loss_of_training(family):
    objective, batch = objective_and_batch(family, **REBUILT[family])
    objective.model.get_output_embeddings().requires_grad_(False)
    with torch.inference_mode():
        got = objective(batch)
    torch.testing.assert_close(got, objective(batch).detach(), rtol=1e-6, atol=0)


def test_an_unknown_change_of_logits_falls_back_to_the_models_own(caplog):
    objective, batch = objective_and_batch("llama")
    forward = objective.model.forward
    objective.model.forward = lambda **inputs: _with(forward(**inputs), torch.sinh)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        got, expected = objective(batch), own_loss(objective.model)
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=0)
    assert "changes logits after its head" in caplog.text


def _with(output, change):
    output.logits = change(output.logits)
    return output


def test_the_check_leaves_modes_and_random_numbers_alone():
    objective, batch = objective_and_batch("llama")
    objective.train()
    objective.model.model.layers[0].eval()
    modes = [module.training for module in objective.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    objective.check(batch)
    assert modes == [module.training for module in objective.modules()]
    assert torch.equal(torch.rand(3), expected)
