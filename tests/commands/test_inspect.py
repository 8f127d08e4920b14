"""`inspect` measures what plain linear algebra on the whole matrices measures, and says what looks wrong."""

import json

import pytest
import torch
from tiny_runs import TINY
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from lightning_peft.__main__ import main
from lightning_peft.adapters.base import Target
from lightning_peft.adapters.dora import DoRAConfig, DoRALinear
from lightning_peft.adapters.inject import adapters
from lightning_peft.adapters.lora import LoRAConfig, LoRALinear
from lightning_peft.adapters.spectrum import (
    count_intruders,
    energy_shares,
    layer_spectrum,
    low_rank_values,
    overlap,
    warnings_of,
)
from lightning_peft.commands import inspect as command
from lightning_peft.commands.adapted import load_for_inference
from lightning_peft.evaluation.smaller_ranks import RankScore, score_ranks
from lightning_peft.models.loading import load_model
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.tiny import tiny_tokenizer
from lightning_peft.quantization.weights import dense_weight

OUT, IN, RANK = 24, 40, 6


def lora(seed: int, scaling: float = 0.5) -> LoRALinear:
    torch.manual_seed(seed)
    base = nn.Linear(IN, OUT, bias=False)
    layer = LoRALinear(base, Target("q", OUT, IN, RANK, scaling * RANK, 0), LoRAConfig(rank=RANK, alpha=scaling * RANK))
    layer.set_factors(torch.randn(RANK, IN), torch.randn(OUT, RANK))
    return layer


def test_figures_are_those_of_the_whole_matrices():
    layer = lora(0)
    found = layer_spectrum(layer)
    A, B, W = layer.lora_A.weight.detach(), layer.lora_B.weight.detach(), layer.base_layer.weight.detach()
    change = (0.5 * B @ A).double()
    values = torch.linalg.svdvals(change)[:RANK]
    torch.testing.assert_close(torch.tensor(found.singular_values, dtype=torch.float64), values, rtol=1e-5, atol=0)
    assert found.norm == pytest.approx(change.norm().item(), rel=1e-5)
    assert found.relative_norm == pytest.approx((change.norm() / W.double().norm()).item(), rel=1e-5)
    assert found.stable_rank == pytest.approx((change.norm() / values[0]).square().item(), rel=1e-5)
    shares = values / values.sum()
    assert found.effective_rank == pytest.approx((-(shares * shares.log()).sum()).exp().item(), rel=1e-5)
    assert found.balance == pytest.approx((B.norm() / A.norm()).item(), rel=1e-6)
    assert (found.rank, found.dead, found.intruders) == (RANK, 0, None)


def test_directions_that_nothing_uses_are_dead():
    layer = lora(1)
    B = layer.lora_B.weight.detach().clone()
    B[:, 2:] = 0
    layer.set_factors(layer.lora_A.weight.detach(), B)
    found = layer_spectrum(layer)
    assert (found.dead, found.rank) == (RANK - 2, RANK) and found.effective_rank <= 2


def test_layer_that_did_not_move_has_no_rank():
    layer = lora(2)
    layer.set_factors(layer.lora_A.weight.detach(), torch.zeros(OUT, RANK))
    found = layer_spectrum(layer)
    assert (found.norm, found.stable_rank, found.effective_rank, found.dead) == (0.0, 0.0, 0.0, RANK)
    assert warnings_of({"q": found}) == ["the adapter changes nothing: every layer is its base"]


def test_values_of_a_product_need_no_product():
    A, B = torch.randn(5, 30, dtype=torch.float64), torch.randn(20, 5, dtype=torch.float64)
    expected = torch.linalg.svdvals(B @ A)[:5].float()
    torch.testing.assert_close(low_rank_values(A, B), expected, rtol=1e-4, atol=1e-5)


def test_intruder_is_a_large_direction_that_the_base_has_not():
    U, _ = torch.linalg.qr(torch.randn(16, 16))
    V, _ = torch.linalg.qr(torch.randn(16, 16))
    weight = U[:, :8] @ torch.diag(torch.arange(8.0, 0.0, -1)) @ V[:, :8].mT
    assert count_intruders(weight, weight, 4) == 0
    # The base writes into eight directions with a value and eight without; a mixture of the latter is close to no one.
    new = U[:, 8:].sum(1, keepdim=True) / 8**0.5
    assert count_intruders(weight, weight + 20 * new @ V[:, 15:].mT, 4) in (0, 1)
    own = torch.linalg.svd(weight, full_matrices=False).U
    mixed = own.sum(1, keepdim=True) / 16**0.5  # a quarter of each direction
    assert count_intruders(weight, weight + 100 * mixed @ torch.randn(1, 16), 1) == 1


def test_overlap_is_one_for_the_same_directions_and_zero_for_others():
    first, second = lora(3), lora(4)
    turn, _ = torch.linalg.qr(torch.randn(RANK, RANK))
    second.set_factors(torch.randn(RANK, IN), first.lora_B.weight.detach() @ turn)
    assert overlap(first, second) == pytest.approx(1.0, abs=1e-5)
    basis, _ = torch.linalg.qr(first.lora_B.weight.detach(), mode="complete")
    second.set_factors(torch.randn(RANK, IN), basis[:, RANK : 2 * RANK].contiguous())
    assert overlap(first, second) == pytest.approx(0.0, abs=1e-5)


def test_shares_and_warnings():
    small, large = layer_spectrum(lora(5, 0.1)), layer_spectrum(lora(6, 1.0))
    shares = energy_shares({"a": small, "b": large}, {"a": "q", "b": "k"})
    assert shares["q"] == pytest.approx(small.norm**2 / (small.norm**2 + large.norm**2))
    assert sum(shares.values()) == pytest.approx(1)
    assert warnings_of({"a": small, "b": large}) == [f"b holds {shares['k']:.0%} of the change"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspected")
    methods = {"lora": ["rank=4"], "vera": ["quantization=nf4"], "dora": ["rank=4"]}
    for name, words in methods.items():
        assert (
            main(
                [
                    "train",
                    *TINY,
                    f"method={name}",
                    *words,
                    "trainer.max_steps=2",
                    "logger=none",
                    f"run_dir={folder / name}",
                ]
            )
            == 0
        )
    return folder


@pytest.mark.parametrize("method", ["lora", "vera"])
def test_command_writes_every_layer(runs, method, capsys):
    words = [f"other_path={runs / method}"] if method == "lora" else []
    assert main(["inspect", str(runs / method), "intruders=2", *words]) == 0
    printed = capsys.readouterr().out
    content = json.loads((runs / method / "inspection.json").read_text())
    model, _ = load_for_inference(str(runs / method), None, "auto")
    found = dict(adapters(model))
    assert content["layers"].keys() == found.keys() and "q_proj" in printed
    assert max(map(len, printed.splitlines()[:8])) <= 80
    name, layer = next(iter(found.items()))
    change = layer.delta_weight().detach().double()
    assert content["layers"][name]["norm"] == pytest.approx(change.norm().item(), rel=1e-3)
    assert sum(content["energy_by_block"].values()) == pytest.approx(1)
    assert (runs / method / "inspection.png").stat().st_size > 1000
    if words:
        assert all(share == pytest.approx(1, abs=1e-4) for share in content["overlap"].values())


def test_smaller_ranks_are_scored_and_the_words_that_cut_are_printed(runs, capsys, monkeypatch):
    output, loads, written = runs / "ranks.json", [], []
    monkeypatch.setattr(command, "load_for_inference", lambda *a: loads.append(a) or load_for_inference(*a))
    monkeypatch.setattr(command, "score_ranks", lambda *a: written.append(output.read_text()) or score_ranks(*a))
    assert main(["inspect", str(runs / "lora"), "smaller_ranks=true", "max_rows=4", f"output={output}"]) == 0
    said, content = capsys.readouterr().out, json.loads(output.read_text())
    found = content.pop("smaller_ranks")
    assert len(loads) == 1 and json.loads(written[0]) == content  # one load, and the inspection before the scores
    assert [score["rank"] for score in found["ranks"]] == [2, 1] and found["rows"] == 4
    if found["as_good"] is None:
        assert "rank 2 does worse than the whole adapter on 4 validation rows, by" in said
    else:
        assert f"lightning-peft convert {runs / 'lora'} rank={found['as_good']} output=" in said


def test_no_rank_is_named_with_a_reason_that_the_table_bears_out():
    def score(rank: int, low: float) -> RankScore:
        return RankScore(rank, 1.0, low + 0.1, (low, low + 0.2))

    worse = "rank 8 does worse than the whole adapter on 9 validation rows, by 0.3"
    assert command._why_none([score(8, 0.2), score(4, 0.4)], 9) == f"{worse}, and so does every smaller one"
    found = command._why_none([score(8, 0.2), score(4, -0.1), score(2, -0.1)], 9)
    assert found == f"{worse}; of rank 4, 2 that is not shown: more rows would tell"
    assert command._why_none([], 9) == "rank 1 is the smallest there is"


def test_magnitude_has_its_share_of_a_doras_change():
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT, bias=False)
    layer = DoRALinear(base, Target("q", OUT, IN, RANK, 3.0, 0), DoRAConfig(rank=RANK, alpha=3.0))
    layer.set_factors(torch.randn(RANK, IN), torch.randn(OUT, RANK))
    assert layer_spectrum(layer).magnitude == pytest.approx(0, abs=1e-10)
    layer.lora_magnitude_vector.data *= torch.linspace(0.8, 1.3, OUT)
    turned = 0.5 * layer.lora_B.weight.detach() @ layer.lora_A.weight.detach()
    moved = layer.delta_weight().detach() - turned  # this is not s B A
    expected = moved.square().sum() / (moved.square().sum() + turned.square().sum())
    assert layer_spectrum(layer).magnitude == pytest.approx(float(expected), rel=1e-4)


def test_effect_stands_beside_the_error_of_the_codes(runs, capsys):
    output = runs / "coded.json"
    assert main(["inspect", str(runs / "vera"), f"output={output}"]) == 0
    assert "codes / W" in capsys.readouterr().out
    model, _ = load_for_inference(str(runs / "vera"), None, "auto")
    whole = load_model(ModelConfig(name="tiny"), torch.float32)
    for name, figures in json.loads(output.read_text())["layers"].items():
        weight = whole.get_submodule(name).weight.detach()
        error = dense_weight(model.get_submodule(name).base_layer) - weight
        assert figures["quantization_error"] == pytest.approx(float(error.norm() / weight.norm()), rel=1e-5)
        assert 0.05 < figures["quantization_error"] < 0.15  # normal weights in NF4, blocks of 64, have about 0.09


def test_layers_that_cannot_be_compared_are_counted(runs, capsys):
    output = runs / "both.json"
    assert main(["inspect", str(runs / "dora"), f"other_path={runs / 'lora'}", f"output={output}"]) == 0
    said = "14 of 14 layers are not compared: the change of one of the two is no low-rank sum"
    assert said in capsys.readouterr().err and "overlap" not in json.loads(output.read_text())


def test_what_trains_beside_the_adapters_is_named(tmp_path, capsys):
    words = [*TINY, "adapter.trainable_modules=[model.norm]", "trainer.max_steps=1", "logger=none"]
    assert main(["train", *words, f"run_dir={tmp_path / 'run'}"]) == 0
    assert main(["inspect", str(tmp_path / "run")]) == 0
    said = "also trained, and in no figure here: 1 of the base's tensors, as model.norm.weight"
    assert said in capsys.readouterr().out
    content = json.loads((tmp_path / "run" / "inspection.json").read_text())
    assert content["trained_beside"] == ["model.norm.weight"]


def test_adapters_of_two_bases_are_refused_before_one_is_read(runs, tmp_path, capsys, monkeypatch):
    sizes = dict(hidden_size=96, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=300)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    words = [*TINY[1:], "model=hf", f"model.path={tmp_path / 'model'}", "trainer.max_steps=1", "logger=none"]
    assert main(["train", *words, f"run_dir={tmp_path / 'other'}"]) == 0
    capsys.readouterr()
    loads = []
    monkeypatch.setattr(command, "load_for_inference", lambda *a: loads.append(a) or load_for_inference(*a))
    assert main(["inspect", str(runs / "lora"), str(tmp_path / "other"), f"output={tmp_path / 'i.json'}"]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "only adapters of one base are compared" in said and not loads
    (tmp_path / "other/adapter/lineage.json").unlink()  # as one of HF PEFT, whose base has no fingerprint
    words = [str(runs / "lora"), str(tmp_path / "other/adapter"), f"output={tmp_path / 'i.json'}"]
    assert main(["inspect", *words]) == 2
    assert "its model.layers.0.mlp.down_proj is of (96, 64), here (64, 128); only" in capsys.readouterr().err


def test_wrong_words_are_one_line(runs, capsys):
    assert main(["inspect", str(runs / "lora"), "intruders=-1"]) == 2
    assert "intruders=-1: must be at least 0" in capsys.readouterr().err
    assert main(["inspect", str(runs / "nowhere")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_stacks_of_experts_are_left_out_with_a_line(tmp_path, capsys):
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=300)
    config = Qwen3MoeConfig(
        **sizes, num_key_value_heads=4, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for name, words in (
        ("both", ["adapter.experts=2"]),
        ("alone", ["adapter.experts=2", "adapter.target_modules=[experts.gate_up_proj,experts.down_proj]"]),
    ):
        run_dir = tmp_path / name
        words = ["model=hf", f"model.path={tmp_path / 'model'}", *words, "trainer.max_steps=1", "logger=none"]
        assert main(["train", *TINY[1:], *words, f"run_dir={run_dir}"]) == 0
    assert main(["inspect", str(tmp_path / "both"), "smaller_ranks=true"]) == 2
    assert "smaller_ranks=true: model.layers.0.mlp.experts" in capsys.readouterr().err
    assert not (tmp_path / "both" / "inspection.json").exists()
    assert main(["inspect", str(tmp_path / "both")]) == 0
    content = json.loads((tmp_path / "both" / "inspection.json").read_text())
    assert content["layers"] and not any("experts" in name for name in content["layers"])
    assert "4 stacks of experts are left out, as model.layers.0.mlp.experts" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "alone")]) == 2
    assert "adapts no layer of one matrix, and others are not inspected" in capsys.readouterr().err
