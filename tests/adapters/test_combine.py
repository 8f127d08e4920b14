"""Cuts and combinations of low-rank changes are the papers' formulas, and HF PEFT's where it computes them."""

import pytest
import torch
from adapter_models import adapted, config_for, llama, logits, perturb
from peft import LoraConfig, get_peft_model
from torch import nn

from lightning_peft.adapters.base import LowRank
from lightning_peft.adapters.changes import NotOneMatrixError, changes_of, inject_changes, take_out_adapters
from lightning_peft.adapters.combine import (
    Combine,
    Cut,
    combined,
    concatenated,
    cut,
    cut_dense,
    dare,
    dense,
    rank_of_energy,
    ties,
)
from lightning_peft.adapters.inject import adapters, inject_adapters
from lightning_peft.adapters.lora import LoRAConfig

OUT, IN = 12, 20


def change(rank: int, seed: int, scaling: float = 0.5) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, IN, generator=generator), torch.randn(OUT, rank, generator=generator), scaling)


def test_cut_is_the_nearest_of_its_rank():
    whole = change(6, 0)
    part, lost = cut(whole, Cut(rank=2))
    values = torch.linalg.svdvals(dense(whole).double())
    residual = (dense(whole) - dense(part)).double().square().sum()
    torch.testing.assert_close(residual, values[2:].square().sum(), rtol=1e-4, atol=0)  # Eckart and Young, fp32
    assert lost == pytest.approx(float(residual / values.square().sum()), rel=1e-4) and part.scaling == 1
    from_matrix, lost_dense = cut_dense(dense(whole), Cut(rank=2))
    torch.testing.assert_close(dense(from_matrix), dense(part), rtol=1e-4, atol=1e-5)
    assert lost_dense == pytest.approx(lost, rel=1e-4)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 1.0])
def test_rank_of_energy_is_the_smallest_that_keeps_the_share(share):
    values = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.0, 0.0])
    energy = values.square() / values.square().sum()
    rank = rank_of_energy(values, share)
    assert energy[:rank].sum() >= share - 1e-6 and (rank == 1 or energy[: rank - 1].sum() < share)


def test_no_change_has_rank_one_and_loses_nothing():
    nothing = LowRank(torch.randn(4, IN), torch.zeros(OUT, 4), 2.0)
    part, lost = cut(nothing, Cut(energy=0.9))
    assert (len(part.A), lost) == (1, 0.0) and not dense(part).any()


def test_rank_above_the_changes_own_keeps_it():
    whole = change(3, 1)
    part, lost = cut(whole, Cut(rank=8))
    assert len(part.A) == 3 and lost == 0
    torch.testing.assert_close(dense(part), dense(whole), rtol=1e-4, atol=1e-5)


def test_sum_is_exact_for_other_ranks_scalings_and_signs():
    parts, weights = [change(2, 2, 0.5), change(5, 3, 4.0), change(1, 4, 1.0)], [0.7, -0.3, 0.0]
    expected = sum(w * dense(p).double() for w, p in zip(weights, parts, strict=True))
    found = concatenated(parts, weights)
    assert len(found.A) == 8
    torch.testing.assert_close(dense(found).double(), expected, rtol=1e-5, atol=1e-5)


def test_ties_by_hand():
    # Section 4.2 on six numbers, density 1/2: trimmed, signs by the sum, the mean of those that agree.
    a = torch.tensor([[3.0, -2.0, 0.1, 1.0, -0.2, 0.0]])
    b = torch.tensor([[-1.0, -4.0, 5.0, 0.1, 0.2, 0.3]])
    # trimmed: [3 -2 0 1 0 0] and [-1 -4 5 0 0 0]; signs + - + + 0 0
    expected = torch.tensor([[3.0, -3.0, 5.0, 1.0, 0.0, 0.0]])
    torch.testing.assert_close(ties([a, b], 0.5, torch.Generator()), expected, rtol=0, atol=0)


def test_dare_keeps_a_share_enlarged_and_follows_its_seed():
    whole = torch.ones(200, 200)
    found = dare([whole, 2 * whole], 0.25, torch.Generator().manual_seed(3))
    again = dare([whole, 2 * whole], 0.25, torch.Generator().manual_seed(3))
    other = dare([whole, 2 * whole], 0.25, torch.Generator().manual_seed(4))
    assert torch.equal(found, again) and not torch.equal(found, other)
    assert set(found.unique().tolist()) == {0.0, 4.0, 8.0, 12.0}  # neither, one, the other, both
    # Mean 3 for any density: the standard error of 40,000 draws is 0.02.
    assert float(found.mean()) == pytest.approx(3.0, abs=0.1)


def test_changed_bias_is_no_change_of_one_matrix():
    model = perturb(adapted("ia3"))
    with pytest.raises(NotOneMatrixError, match="IA3.* changes a bias as well"):
        changes_of(model)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize(
    "config",
    [
        config_for("adalora"),
        config_for("vera"),
        LoRAConfig(rank=4, rank_stabilized=True, rank_pattern={"q_proj": 2}),
        LoRAConfig(rank=4, target_modules=["q_proj", "lm_head", "embed_tokens"]),
    ],
    ids=["adalora", "vera", "rank_pattern", "head_and_embedding"],
)
def test_changes_put_back_as_lora_or_dora_compute_the_same(config, method):
    model = llama()
    inject_adapters(model, config)
    expected = logits(perturb(model))
    found = {name: cut(change, Cut())[0] for name, change in changes_of(model).items() if isinstance(change, LowRank)}
    take_out_adapters(model)
    assert not dict(adapters(model))
    inject_changes(model, found, method)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(IN, OUT, bias=False)

    def forward(self, x):
        return self.q(x)


@pytest.mark.parametrize(
    ("theirs", "ours", "weights", "density"),
    [
        ("cat", Combine.linear, [0.7, 0.3], None),
        ("cat", Combine.linear, [0.7, -0.3], None),
        ("svd", Combine.svd, [0.7, 0.3], None),
        ("ties_svd", Combine.ties, [1.0, 1.0], 0.4),
        ("dare_linear_svd", Combine.dare, [0.7, 0.3], 1.0),
    ],
)
@pytest.mark.filterwarnings("ignore:The density 1.0 is greater")
def test_equals_peft(theirs, ours, weights, density):
    """DARE at density one, as the two draw other numbers; TIES at equal weights, as HF elects signs without them."""
    parts = {"one": change(3, 5, 2.0), "two": change(5, 6, 2.0)}
    model = get_peft_model(Net(), LoraConfig(r=3, lora_alpha=6, target_modules=["q"]), adapter_name="one")
    model.add_adapter("two", LoraConfig(r=5, lora_alpha=10, target_modules=["q"]))
    layer = model.base_model.model.q
    for name, part in parts.items():
        layer.lora_A[name].weight.data.copy_(part.A)
        layer.lora_B[name].weight.data.copy_(part.B)
    with torch.no_grad():
        rank = None if theirs == "cat" else 5
        model.add_weighted_adapter(["one", "two"], weights, "both", theirs, svd_rank=rank, density=density)
    found = combined(list(parts.values()), weights, ours, density or 1.0, torch.Generator())
    if theirs != "cat":
        found, _ = cut_dense(found, Cut(5)) if isinstance(found, torch.Tensor) else cut(found, Cut(5))
    assert isinstance(found, LowRank)
    torch.testing.assert_close(dense(found), layer.get_delta_weight("both").detach(), rtol=1e-3, atol=1e-4)
