"""HF PEFT computes the same from the same weights."""

from typing import Any

import peft
import pytest
import torch
from adapter_models import adapted, llama, logits, perturb, tokens
from torch import Tensor, nn

from lightning_peft.adapters.adalora import AdaLoRAConfig, AdaLoRALinear, RankSchedule
from lightning_peft.adapters.inject import SHARED, adapters, inject_adapters, regularization
from lightning_peft.adapters.lora import LoRAConfig

# HF PEFT's own call of what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KEY_VALUE_DOWN = ["k_proj", "v_proj", "down_proj"]

THEIRS: dict[str, peft.PeftConfig] = {
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=8, total_step=100, target_modules=LINEARS),
    "dora": peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=LINEARS),
    "hira": peft.HiraConfig(r=4, target_modules=LINEARS),
    "ia3": peft.IA3Config(target_modules=KEY_VALUE_DOWN, feedforward_modules=["down_proj"]),
    "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS),
    "miss": peft.MissConfig(r=4, target_modules=LINEARS),
    "vera": peft.VeraConfig(r=4, target_modules=LINEARS),
}


def peft_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter tensors by the names HF PEFT has for them."""
    state = {
        f"base_model.model.{layer_name}.{name}": parameter.detach().clone()
        for layer_name, layer in adapters(model)
        for name, parameter in layer.named_parameters()
        if not name.startswith("base_layer.")
    }
    if hasattr(model, SHARED):
        state |= {f"base_model.{name}": tensor for name, tensor in getattr(model, SHARED).state_dict().items()}
    return state


def peft_twin(model: nn.Module, config: peft.PeftConfig) -> peft.PeftModel:
    """Return HF's model with the weights of ours."""
    twin = peft.get_peft_model(llama(), config).eval()
    result = peft.set_peft_model_state_dict(twin, peft_state(model))
    assert not result.unexpected_keys
    return twin


@pytest.mark.parametrize("method", THEIRS)
def test_logits_equal(method: str) -> None:
    ours = perturb(adapted(method))

    theirs = peft_twin(ours, THEIRS[method])

    # The same fp32 products in another order.
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", THEIRS)
def test_names_and_shapes_of_trained_tensors_equal(method: str) -> None:
    ours = peft_state(adapted(method))

    theirs = peft.get_peft_model_state_dict(peft.get_peft_model(llama(), THEIRS[method]))

    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}


@pytest.mark.parametrize("method", ["dora", "vera", "lora", "miss", "hira", "ia3"])
def test_gradients_equal(method: str) -> None:
    ours = perturb(adapted(method))
    theirs = peft_twin(ours, THEIRS[method])

    for model in (ours, theirs):
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()

    expected = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    expected = {n.replace("magnitude_vector.weight", "magnitude_vector"): grad for n, grad in expected.items()}
    actual = {f"base_model.model.{n}": p.grad for n, p in ours.named_parameters() if p.requires_grad}
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"rank_stabilized": True}, {"rank_pattern": {"q_proj": 2}}, {"alpha_pattern": {"down_proj": 3.0}}],
    ids=lambda options: next(iter(options)),
)
def test_lora_scalings_equal(options: dict[str, Any]) -> None:
    words = {"rank_stabilized": "use_rslora"}
    theirs = {words.get(name, name): value for name, value in options.items()}
    alpha = {"rank_pattern": 8.0}
    ours = llama()
    inject_adapters(ours, LoRAConfig(rank=4, alpha=alpha.get(next(iter(options)), 8.0), **options))
    perturb(ours)

    twin = peft_twin(ours, peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, **theirs))

    torch.testing.assert_close(logits(ours), logits(twin), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_embedding_logits_equal(use_dora: bool) -> None:
    targets = ["embed_tokens", "q_proj"]
    ours = perturb(adapted("dora" if use_dora else "lora", target_modules=targets))

    theirs = peft_twin(ours, peft.LoraConfig(r=4, lora_alpha=8, use_dora=use_dora, target_modules=targets))

    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)


def test_vera_draws_the_pair_of_peft() -> None:
    ours = getattr(adapted("vera", projection_seed=7), SHARED)

    theirs = peft.get_peft_model(llama(), peft.VeraConfig(r=4, projection_prng_key=7, target_modules=LINEARS))

    assert torch.equal(ours.vera_A, theirs.base_model.vera_A["default"])
    assert torch.equal(ours.vera_B, theirs.base_model.vera_B["default"])


def test_adalora_regularization_equals() -> None:
    ours = perturb(adapted("adalora"))
    theirs = peft_twin(ours, THEIRS["adalora"])
    plain = torch.nn.functional.cross_entropy(theirs(tokens()).logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())

    with_penalty = theirs.base_model(input_ids=tokens(), labels=tokens()).loss

    penalty = regularization(ours)
    assert penalty is not None
    torch.testing.assert_close(penalty, with_penalty - plain, atol=1e-5, rtol=1e-5)


def test_adalora_cuts_what_peft_cuts() -> None:
    ours = perturb(adapted("adalora"))
    config = AdaLoRAConfig(rank=4, target_rank=2, warmup_share=0.1, final_share=0.2, every_n_steps=2)
    words = {"tinit": 1, "tfinal": 2, "deltaT": 2, "total_step": 10}
    theirs = peft_twin(ours, peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=8, target_modules=LINEARS, **words))
    layers = {name: layer for name, layer in adapters(ours) if isinstance(layer, AdaLoRALinear)}
    schedule = RankSchedule(layers, config, total_steps=10)

    for step in range(1, 10):
        for model in (ours, theirs.base_model.model):
            model.zero_grad()
            batch = tokens(batch=step)
            model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.sub_(0.5 * parameter.grad)
        schedule.after_step(step)
        theirs.base_model.update_and_allocate(step)

    state = peft_state(ours)
    kept = [int((state[name] != 0).sum()) for name in state if name.endswith("lora_E")]
    assert sum(kept) == 2 * len(layers) and len(set(kept)) > 1
    for name, parameter in theirs.named_parameters():
        if "lora_E" in name:
            torch.testing.assert_close(parameter.data, state[name.replace(".default", "")], atol=1e-5, rtol=1e-3)
