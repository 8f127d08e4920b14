"""The log of an adapter while it trains says what its matrices say, and tells once what looks wrong."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from tiny_runs import plain_trainer, tiny_config, tiny_parts
from torch import nn

from lightning_peft.adapters.inject import adapters, inject_adapters
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.adapters.spectrum import layer_spectrum
from lightning_peft.commands.train import train
from lightning_peft.training.callbacks import adapter_health
from lightning_peft.training.callbacks.adapter_health import AdapterHealth, gradient_shares
from lightning_peft.training.config import HealthConfig
from lightning_peft.training.guard import Diverged
from lightning_peft.training.health import ChangeMeter, ChangeSize, alarms_of, is_no_op

RUN = ["trainer.max_steps=4", "health.every_n_steps=2", "data.packing=false", "checkpoint.every_n_steps=2"]


def rows_of(run_dir: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run_dir / "metrics.csv").read_text().splitlines()))


@pytest.mark.parametrize("method", ["lora", "dora", pytest.param("qlora", marks=pytest.mark.slow)])
def test_changes_are_those_of_the_dense_matrices(method):
    """The changes come of an SVD of the whole, where the meter looks at matrices of rank x rank, or iterates."""
    module, data = tiny_parts(tiny_config(Path("unused"), f"method={method}", "data.packing=false"))
    plain_trainer(max_steps=3).fit(module, datamodule=data)
    found = ChangeMeter().measure(module.model, module.objective)
    layers = dict(adapters(module.model))
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        spectrum = layer_spectrum(layer)
        change = found[name]
        assert change.relative_norm == pytest.approx(spectrum.relative_norm, rel=1e-4)
        values = torch.linalg.svdvals(layer.delta_weight().detach().double())
        stable = float(values.square().sum() / values[0].square())
        assert change.stable_rank == pytest.approx(stable, rel=1e-3 if change.rank else 0.05)
        if change.rank:
            assert change.effective_rank == pytest.approx(spectrum.effective_rank, rel=1e-3)


def test_health_stands_in_metrics_csv_at_its_steps(tmp_path):
    train(tiny_config(tmp_path / "run", *RUN))
    rows = [row for row in rows_of(tmp_path / "run") if row["loss"]]
    columns = [name for name in rows[0] if name.startswith("health/")]
    assert len(columns) == 3 * 14 and "health/model.layers.0.self_attn.q_proj/gradient_B" in columns
    for row in rows:
        assert all(bool(row[name]) == (row["step"] in ("2", "4")) for name in columns)
    shares = [float(rows[1][name]) for name in columns if name.endswith("gradient_B")]
    assert all(0 < share < 1 for share in shares)


def test_gradient_share_is_b_over_both():
    class Shares(AdapterHealth):
        def on_train_batch_end(self, trainer, pl_module, *_):
            Shares.found = gradient_shares(pl_module.model)
            name, layer = next(iter(adapters(pl_module.model)))
            A, B = (getattr(layer, key).weight.grad.square().sum() for key in ("lora_A", "lora_B"))
            Shares.expected = name, float(B / (A + B))

    module, data = tiny_parts(tiny_config(Path("unused"), "data.packing=false"))
    plain_trainer(max_steps=2, callbacks=[Shares(HealthConfig())]).fit(module, datamodule=data)
    name, expected = Shares.expected
    assert Shares.found[name] == pytest.approx(expected)


def test_measuring_changes_no_number(tmp_path):
    for name, words in (("with", []), ("without", ["health.every_n_steps=null"])):
        train(tiny_config(tmp_path / name, *RUN, *words))
    losses = [[row["loss"] for row in rows_of(tmp_path / name)] for name in ("with", "without")]
    assert losses[0] == losses[1]


def change(norm: float, rank: int = 64, effective: float = 40.0) -> ChangeSize:
    return ChangeSize(norm / 10, norm, 1.0, rank, effective)


def test_alarms_name_what_is_wrong():
    assert alarms_of({"a": change(1.0), "b": change(1.0), "c": change(1.0)}) == {}
    assert "every layer is its base" in alarms_of({"a": change(0.0), "b": change(0.0)})["no change"]
    assert alarms_of({"a": change(3.0), "b": change(1.0)}) == {"one layer": "a holds 90% of the adapter's change"}
    found = alarms_of({name: change(1.0, 64, 6.0) for name in "abc"})
    assert found == {"unused rank": "rank 64 is used as if it were 6.0: a smaller one may do"}
    assert not is_no_op([]) and is_no_op([change(0.0)])


def test_alarm_is_told_once(tmp_path, caplog):
    train(tiny_config(tmp_path / "run", *RUN, "optimizer.lr=1e-30", "guard.no_op_steps=null"))
    assert caplog.text.count("step 2: the adapter changes nothing: every layer is its base") == 1
    assert caplog.text.count("the adapter changes nothing") == 1


def test_end_of_a_run_says_what_looks_wrong_and_keeps_it(tmp_path, caplog, capsys, monkeypatch):
    monkeypatch.setattr(adapter_health, "ENOUGH_STEPS", 2)
    words = [*RUN, "optimizer.lr=1e-30", "guard.no_op_steps=null", "health.every_n_steps=100"]
    result = train(tiny_config(tmp_path / "run", *words))
    said = "the adapter changes nothing: every layer is its base"
    assert result["warnings"] == json.loads((tmp_path / "run" / "result.json").read_text())["warnings"] == [said]
    assert capsys.readouterr().out.rstrip().endswith(said) and said not in caplog.text
    sound = train(tiny_config(tmp_path / "sound", *RUN, "optimizer.lr=0.01", "adapter.rank=4"))
    assert not any("changes nothing" in text for text in sound.get("warnings", []))


def lora_model(*spoilt: str) -> nn.Module:
    """Return a model of layers a, b and c whose adapters change them; the named ones have an infinite B."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(20, 12, bias=False) for name in "abc"})
    inject_adapters(model, LoRAConfig(method="lora", rank=8, target_modules=["a", "b", "c"]))
    for name, layer in adapters(model):
        layer.set_factors(torch.randn(8, 20), torch.randn(12, 8) * (math.inf if name in spoilt else 1.0))
    return model


def test_what_is_not_finite_is_measured_as_nan_and_gives_no_alarm():
    sound, model = (ChangeMeter().measure(model, model) for model in (lora_model(), lora_model("b")))
    assert sound["a"] == model["a"] and sound["c"] == model["c"]
    assert all(math.isnan(value) for value in (model["b"].norm, model["b"].stable_rank, model["b"].effective_rank))
    assert not is_no_op(model.values()) and not is_no_op([model["b"]])
    assert alarms_of(model) == alarms_of({name: sound[name] for name in "ac"}) and alarms_of({"b": model["b"]}) == {}


def test_run_that_diverged_is_told_by_the_guard_and_not_by_the_measuring(tmp_path):
    words = ["health.every_n_steps=1", "guard.no_op_steps=1", "optimizer.lr=1e38", "schedule.warmup_steps=0"]
    with pytest.raises(Diverged) as found:
        train(tiny_config(tmp_path / "run", *RUN, *words))
    assert found.value.reason.startswith("loss nan") and found.value.step == 2


def test_base_weight_of_zeros_has_no_share():
    model = lora_model()
    model["a"].base_layer.weight.data.zero_()
    found = ChangeMeter().measure(model, model)["a"]
    assert found.relative_norm == math.inf and not is_no_op([found])
    spectrum = layer_spectrum(model["a"])
    assert spectrum.relative_norm is None and spectrum.norm == pytest.approx(found.norm, rel=1e-5)
    model["a"].set_factors(torch.randn(8, 20), torch.zeros(12, 8))
    assert is_no_op([ChangeMeter().measure(model, model)["a"]])
