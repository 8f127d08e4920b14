"""BaLoRA: its KL, its variances for each sample, the distribution it draws from, and its mean."""

import json
from pathlib import Path

import pytest
import torch
from adapter_models import adapted, config_for, logits, perturb, tokens
from peft import PeftModel
from tiny_runs import tiny_config, tiny_parts
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from lightning_peft.adapters.balora import BaLoRALinear, InputVariance, kl_to_prior, sampling
from lightning_peft.adapters.inject import SHARED, adapters, inject_adapters, regularization, step_schedule
from lightning_peft.checkpoint.peft_format import adapter_config_from_peft, load_adapter, save_adapter
from lightning_peft.data.collate import collate
from lightning_peft.models.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def shared_of(model: nn.Module) -> InputVariance:
    shared = getattr(model, SHARED)
    assert isinstance(shared, InputVariance)
    return shared


@pytest.mark.parametrize(("alpha", "prior", "expected"), [(1.0, 0.5, 0.5), (0.3, 0.5, 0.75199)])
def test_kl_of_the_worked_examples(alpha: float, prior: float, expected: float) -> None:
    assert float(kl_to_prior(torch.tensor(alpha), prior)) == pytest.approx(expected, abs=1e-5)


def test_kl_is_that_of_two_normals_about_zero_mean_prior() -> None:
    a, alpha, ratio = torch.tensor(0.7), torch.tensor(0.2), 0.1 / 0.9
    expected = kl_divergence(Normal(a, alpha.sqrt() * a), Normal(0.0, ratio**0.5 * a))

    torch.testing.assert_close(kl_to_prior(alpha, 0.1), expected)


def test_penalty_sums_over_elements_and_is_a_mean_over_samples() -> None:
    model = perturb(adapted("balora", kl_weight=0.5, kl_warmup_steps=0)).train()
    step_schedule(model, config_for("balora", kl_weight=0.5, kl_warmup_steps=0), 10)
    ids = tokens()

    model(ids, use_cache=False)

    shared = shared_of(model)
    variances = shared(model.get_input_embeddings()(ids).mean(1))
    sizes = torch.tensor([layer.rank * layer.lora_A.in_features for _, layer in adapters(model)])
    expected = 0.5 * (kl_to_prior(variances, 0.05) * sizes).sum(1).mean()
    torch.testing.assert_close(regularization(model), expected, rtol=1e-5, atol=0)


def test_penalty_is_a_mean_over_samples_that_are_run_apart(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {i} of it", "completion": f"it is {i} " + "and more " * i} for i in range(9)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["method=balora", "adapter.kl_weight=1", "data=jsonl", f"data.train_path={path}", "data.cache_dir=null"]
    module, data = tiny_parts(tiny_config(tmp_path / "run", *words, "data.validation_fraction=0"))
    data.setup()
    module.configure_model()
    model, objective, shared = module.model, module.objective, shared_of(module.model)
    shared.kl_share = 1.0
    with torch.no_grad():
        for layer in shared.variance_net:
            layer.weight.mul_(20)
    samples = [data.training_samples[place] for place in range(len(data.training_samples))]
    batch = collate([samples], 0, sum(len(sample.input_ids) for sample in samples), True)
    objective.train()
    objective.check(batch)
    with torch.no_grad():
        objective(batch)
    assert regularization(model) is None
    objective.runs_apart = True
    found = []
    for part in objective._parts(batch):
        objective._read(part)
        found.append((len(part.input_ids), regularization(model).detach()))
    assert len(found) > 1 and float(found[0][1] / found[-1][1]) != pytest.approx(1, rel=1e-3)
    objective(batch)
    expected = sum(count * penalty for count, penalty in found) / 9
    penalty = regularization(model)
    assert penalty.requires_grad and regularization(model) is None
    torch.testing.assert_close(penalty.detach(), expected, rtol=1e-5, atol=0)


def test_weight_of_the_kl_grows_with_the_steps_and_is_resumed() -> None:
    model = adapted("balora", kl_warmup_steps=4)
    config = config_for("balora", kl_warmup_steps=4)
    schedule = step_schedule(model, config, 10)
    shares = [shared_of(model).kl_share]
    for step in range(1, 6):
        schedule.after_step(step)
        shares.append(shared_of(model).kl_share)
    schedule.after_step(2)
    fresh = adapted("balora", kl_warmup_steps=4)

    step_schedule(fresh, config, 10).load_state_dict(schedule.state_dict())

    assert shares == [0, 0.25, 0.5, 0.75, 1, 1] and shared_of(fresh).kl_share == 0.5


def test_packed_samples_have_the_variances_they_have_alone() -> None:
    model = perturb(adapted("balora"))
    first, second = tokens(1, 5), tokens(1, 7) // 2
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]

    def variances(ids: Tensor, **more: Tensor) -> Tensor:
        with sampling(model), torch.no_grad():
            model(ids, use_cache=False, **more)
            found = shared_of(model).variances
        assert found is not None
        return found

    together = variances(torch.cat([first, second], 1), position_ids=positions)

    torch.testing.assert_close(together, torch.cat([variances(first), variances(second)], 1), rtol=1e-5, atol=0)
    assert not torch.allclose(together[:, 0], together[:, -1])


def test_padding_has_no_part_in_variance_and_penalty(tmp_path: Path) -> None:
    """Rows of four lengths: each alone without padding, all padded to one width, and packed with padding behind."""
    rows = [{"prompt": f"say {i} of it", "completion": f"it is {i} " + "and more " * i} for i in range(4)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["method=balora", "adapter.kl_weight=1", "data=jsonl", f"data.train_path={path}", "data.cache_dir=null"]
    module, data = tiny_parts(tiny_config(tmp_path / "run", *words, "data.validation_fraction=0"))
    data.setup()
    module.configure_model()
    objective, shared = module.objective.train(), shared_of(module.model)
    shared.kl_share = 1.0
    with torch.no_grad():
        for layer in shared.variance_net:
            layer.weight.mul_(20)
    samples = [data.training_samples[place] for place in range(len(data.training_samples))]
    lengths = [len(sample.input_ids) for sample in samples]
    width = max(lengths) + 24

    def found(batch) -> tuple[Tensor, Tensor]:
        objective(batch)
        assert shared.variances is not None
        ends = [int(end) for end in batch.ends]
        return shared.variances.flatten(0, 1)[ends].detach(), regularization(module.model).detach()

    alone = [found(collate([[sample]], 0, len(sample.input_ids), True)) for sample in samples]
    variances, penalty = torch.cat([v for v, _ in alone]), torch.stack([p for _, p in alone]).mean()
    padded = collate([[sample] for sample in samples], 0, width, True)
    packed = collate([samples], 0, sum(lengths) + 24, True)

    assert len(set(lengths)) > 1 and not torch.allclose(variances[0], variances[1], rtol=1e-3)
    for batch in (padded, packed):
        torch.testing.assert_close(found(batch), (variances, penalty), rtol=1e-5, atol=0)


def test_masked_tokens_have_no_part_in_a_plain_call() -> None:
    model, ids = perturb(adapted("balora")), tokens(1, 7)
    padding = torch.zeros(1, 3, dtype=torch.int64)
    mask = torch.tensor([[0] * 3 + [1] * 7])
    with sampling(model), torch.no_grad():
        model(ids, use_cache=False)
        expected = shared_of(model).variances
        model(torch.cat([padding, ids], 1), attention_mask=mask, use_cache=False)
        found = shared_of(model).variances
    assert expected is not None and found is not None
    torch.testing.assert_close(found[:, 3:], expected, rtol=1e-5, atol=0)


def test_drawn_outputs_have_the_mean_and_variance_of_a_drawn_A() -> None:
    """20,000 draws against y with A_w = A + sqrt(alpha) |A| eps: four standard errors."""
    model = perturb(adapted("balora"))
    layer = model.get_submodule("model.layers.0.self_attn.v_proj")
    assert isinstance(layer, BaLoRALinear)
    draws, x = 20_000, torch.randn(64, generator=torch.Generator().manual_seed(4))
    shared_of(model).variances = torch.full((1, draws, 14), 0.3)
    torch.manual_seed(0)
    with torch.no_grad():
        found = layer(x.expand(1, draws, -1))[0]
        shared_of(model).variances = None
        mean = layer(x)
        A, B = layer.factors()
        spread = layer.scaling**2 * B.square() @ (0.3 * A.square() @ x.square())

    error = (spread / draws).sqrt()
    assert ((found.mean(0) - mean).abs() < 4 * error).all()
    torch.testing.assert_close(found.var(0), spread, rtol=4 * (2 / draws) ** 0.5, atol=0)


def test_noise_is_drawn_in_training_and_sampling_alone() -> None:
    model = perturb(adapted("balora"))
    mean = logits(model)
    with sampling(model):
        assert not torch.equal(logits(model), logits(model))

    assert torch.equal(logits(model), mean)
    assert not torch.equal(logits(model.train()), mean)


def test_folder_is_a_lora_for_others_and_whole_for_us(tmp_path: Path) -> None:
    model = tiny_model().eval()
    inject_adapters(model, config := config_for("balora"))
    perturb(model)
    save_adapter(model, config, tmp_path / "a", "tiny")
    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(2))
    expected = model(input_ids=ids).logits

    theirs = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "a")).eval()
    # Sums in another order; logits are of order 1 to 10.
    torch.testing.assert_close(theirs(input_ids=ids).logits, expected, rtol=1e-5, atol=5e-5)
    (tmp_path / "a" / "balora_variance.safetensors").rename(tmp_path / "variance")
    assert adapter_config_from_peft(tmp_path / "a").method == "lora"


def test_variances_come_back_with_the_folder(tmp_path: Path) -> None:
    from lightning_peft.checkpoint.lineage import Lineage

    model = tiny_model().eval()
    inject_adapters(model, config := config_for("balora"))
    perturb(model)
    save_adapter(model, config, tmp_path / "a", "tiny", Lineage("x", "tiny", "balora"))
    fresh = tiny_model().eval()

    inject_adapters(fresh, adapter_config_from_peft(tmp_path / "a"))
    load_adapter(fresh, tmp_path / "a")

    for one, other in zip(shared_of(model).parameters(), shared_of(fresh).parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": 1.0}, "adapter.prior=1.0: must be above 0 and below 1"),
        ({"kl_weight": -1.0}, "adapter.kl_weight=-1.0: must be 0 or more"),
        ({"kl_warmup_steps": -1}, "adapter.kl_warmup_steps=-1: must be 0 or more"),
        ({"init": "pissa"}, "adapter.init=pissa: the mean of A has a part in the base"),
    ],
)
def test_bad_option_is_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_for("balora", **options)
