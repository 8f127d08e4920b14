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
from lightning_peft.objectives.unpacking import unpacked

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


def test_a_model_that_does_not_run_in_16_bits_says_what_to_use():
    objective, batch = objective_and_batch("xlstm")
    objective.model.bfloat16()
    with pytest.raises(ValueError, match="xLSTMForCausalLM of transformers does not run in this .*precision=32-true"):
        objective(batch)


ADDS = {
    "qwen3_moe": ({"output_router_logits": True}, "router_aux_loss_coef=0.001"),
    "jetmoe": ({"output_router_logits": True}, "aux_loss_coef=0.01"),
    "bamba": ({"z_loss_coefficient": 0.01}, "z_loss_coefficient=0.01"),
}


@pytest.mark.parametrize("is_asked", [True, False])
@pytest.mark.parametrize("family", ADDS)
def test_what_a_model_adds_to_its_own_loss_is_said_once(family, is_asked, caplog):
    options, named = ADDS[family]
    objective, batch = objective_and_batch(family, **(options if is_asked else {}))
    with caplog.at_level(logging.WARNING), torch.no_grad():
        objective.train()(batch)
        objective(batch)
    lines = [line for line in caplog.messages if "trained on the cross entropy of the next tokens alone" in line]
    assert len(lines) == int(is_asked) and all(f"({named})" in line for line in lines)


def test_an_unknown_change_of_logits_falls_back_to_the_models_own(caplog):
    objective, batch = objective_and_batch("llama")
    forward = objective.model.forward
    objective.model.forward = lambda **inputs: _with(forward(**inputs), torch.sinh)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        got, expected = objective(batch), own_loss(objective.model)
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=0)
    assert "changes logits after its head" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "qwen3_next"])
def test_autocast_is_no_change_of_hidden_states(family, dtype, caplog):
    objective, batch = objective_and_batch(family, **REBUILT[family])
    objective(batch)
    expected, objective.is_checked = objective.logit_path, False
    with caplog.at_level(logging.WARNING), torch.autocast("cpu", dtype):
        objective(batch)
    assert _parts(objective.logit_path) == _parts(expected) and "own logits" not in caplog.text


def _parts(path):
    return [f if f is None else (f.func, f.args, f.keywords) for f in path]


@pytest.mark.parametrize("share", [0.01, 0.001])
def test_a_small_change_before_the_head_is_seen_under_autocast(share, caplog):
    objective, batch = objective_and_batch("llama")
    objective.model.get_output_embeddings().register_forward_pre_hook(lambda head, args: args[0] * (1 + share))
    with caplog.at_level(logging.WARNING), torch.autocast("cpu", torch.bfloat16):
        objective(batch)
    assert "changes hidden states before its head" in caplog.text


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


@pytest.mark.parametrize(("family", "options"), [("cpmant", {}), ("roberta", {"is_decoder": False}), ("bert", {})])
def test_a_model_that_sees_the_tokens_it_predicts_is_refused(family, options):
    objective, batch = objective_and_batch(family, **options)
    with pytest.raises(ValueError, match="sees the tokens that it is to predict: logits differ by .* causal model"):
        objective(batch)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named_before_the_first_step(value):
    objective, batch = objective_and_batch("llama")
    with torch.no_grad():
        objective.model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(
        ValueError, match="1 weights of .* are not finite: model.layers.1.mlp.up_proj.weight; the check"
    ):
        objective(batch)


def test_logits_that_overflow_are_laid_to_the_precision():
    objective, batch = objective_and_batch("llama")
    with torch.no_grad():
        for layer in (objective.model.model.layers[1].mlp.up_proj, objective.model.model.layers[1].mlp.gate_proj):
            layer.weight.mul_(1e3)
    objective.model.half()
    with pytest.raises(
        ValueError, match="logits that are not finite in torch.float16, though its weights are: use trai"
    ):
        objective(batch)


def packed_batch():
    generator = torch.Generator().manual_seed(3)
    rows = []
    for lengths in ((23, 30), (14, 9, 17)):
        ids = [torch.randint(3, 90, (length,), generator=generator).tolist() for length in lengths]
        weights = [[0.5 + place / 8 for place in range(length)] for length in lengths]
        # Neither prompts nor the ends of samples are labelled.
        labels = [[-100, -100, *sample[2:-2], -100, -100] for sample in ids]
        samples = zip(ids, labels, weights, strict=True)
        rows.append([Encoded(tokens, own, True, weights=factors) for tokens, own, factors in samples])
    return rows


def mixing(family="llama", packing="auto"):
    """Return a model whose kernel for packed samples forgets where they begin, as a broken build of one may."""
    objective, _ = objective_and_batch(family)
    objective.packing = packing
    for layer in objective.model.model.layers:
        layer.self_attn.register_forward_pre_hook(forget_samples, with_kwargs=True)
    return objective


def forget_samples(module, args, kwargs):
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is not None:
        row = 56
        kwargs["cu_seq_lens_q"] = bounds[(bounds % row == 0) | (bounds == bounds[-1])]
        kwargs["max_length_q"] = int(kwargs["cu_seq_lens_q"].diff().max())
    return args, kwargs


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_samples_that_see_each_other_are_run_apart(family, caplog):
    batch = collate(packed_batch(), 0, 56, packing=True)
    exact, _ = objective_and_batch(family)
    expected = exact(batch)
    objective = mixing(family)
    with caplog.at_level(logging.WARNING):
        losses = [objective(batch), objective(batch)]
    assert caplog.text.count("packed samples see each other in") == 1 and objective.packing_difference > 1e-2
    for loss in losses:
        torch.testing.assert_close(loss, expected, rtol=2e-5, atol=0)
    weight = objective.model.get_input_embeddings().weight
    (got,) = torch.autograd.grad(losses[0], weight)
    (right,) = torch.autograd.grad(expected, exact.model.get_input_embeddings().weight)
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4 * right.abs().max())


def test_packing_that_was_asked_for_is_refused_where_samples_see_each_other():
    with pytest.raises(ValueError, match="data.packing=true: packed samples see each other in LlamaForCausalLM"):
        mixing(packing=True)(collate(packed_batch(), 0, 56, packing=True))


@pytest.mark.parametrize("at_once", [False, True])
def test_unpacked_batches_hold_every_label_once(at_once):
    batch = collate(packed_batch(), 0, 56, packing=True)
    parts = unpacked(batch, at_once)
    assert (len(parts) == 1) is at_once
    assert sum(part.num_supervised for part in parts) == batch.num_supervised
    assert sum(part.input_ids.shape[0] for part in parts) == 5
    most = max(batch.input_ids.numel(), 32)
    assert at_once or all(part.input_ids.numel() <= most for part in parts)
    labels = torch.cat([part.labels[part.labels != -100] for part in parts]).sort().values
    assert torch.equal(labels, batch.labels[batch.labels != -100].sort().values)


def test_a_filler_is_run_apart_without_a_label():
    (part,) = unpacked(collate(packed_batch(), 0, 56, packing=True, filler=True))
    assert part.num_supervised == 0 and part.input_ids.shape == (1, 8)
    loss = mixing()(collate(packed_batch(), 0, 56, packing=True, filler=True))
    assert float(loss.detach()) == 0 and loss.requires_grad
