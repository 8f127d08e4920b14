"""The benchmark of a GPU runs here first: every run composes, and on a tiny shape every part is measured."""

import json

import pytest
import torch

from benchmarks.gpu import PARTS, Run, main, verdict, wrong_losses
from benchmarks.shapes import SHAPES, write_shape
from lightning_peft.compose import compose_config
from lightning_peft.models.loading import empty_model
from lightning_peft.models.source import ModelConfig

RUNS = {name: run for runs in PARTS.values() for name, run in runs.items()}


@pytest.mark.parametrize("name", RUNS)
def test_run_composes(name):
    compose_config("train", ["model=hf", "model.path=shape", "model.random_weights=true", *RUNS[name].words])


@pytest.mark.parametrize(
    "shape, millions", [("smollm2_135m", 134.5), ("smollm2_360m", 361.8), ("llama_8b", 8030.3), ("llama_70b", 70553.7)]
)
def test_shape_has_the_published_number_of_parameters(shape, millions, tmp_path):
    write_shape(shape, tmp_path)
    model = empty_model(ModelConfig("hf", str(tmp_path), random_weights=True))
    assert round(sum(parameter.numel() for parameter in set(model.parameters())) / 1e6, 1) == millions


def test_every_run_has_a_known_shape():
    assert {run.shape for run in RUNS.values()} <= set(SHAPES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, capsys):
    assert main(["--output", f"{tmp_path}/gpu.json"]) == 0
    assert capsys.readouterr().out.startswith("skipped: this machine has no CUDA device")
    assert not (tmp_path / "gpu.json").exists()


def test_bars_are_floors_for_rates_and_ceilings_for_memory():
    row = {"tokens_per_second": 10.0, "peak_gib": 10.0}
    assert verdict(row, {"tokens_per_second": 9.0, "peak_gib": 9.0}) == {"tokens_per_second": True, "peak_gib": False}


@pytest.mark.slow
def test_every_part_is_measured_on_a_tiny_shape(tmp_path, forked_starts):
    words = ["--device", "cpu", "--shape", "tiny", "--tokens", "512", "--output", f"{tmp_path}/gpu.json"]
    assert main(words) == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert list(rows) == list(RUNS)
    for name, row in rows.items():
        assert "failed" not in row, f"{name}: {row}"
        assert row["tokens_per_second"] > 0 and len(row["losses"]) == RUNS[name].steps


@pytest.mark.slow
def test_failed_run_is_a_row_that_says_why(tmp_path, monkeypatch, forked_starts):
    broken = {"broken": Run("tiny", 1, 64, ["method=lora", "optimizer.lr=-1"])}
    monkeypatch.setitem(PARTS, "lora", broken)
    main(["--part", "lora", "--device", "cpu", "--output", f"{tmp_path}/gpu.json"])
    assert "optimizer.lr=-1" in json.loads((tmp_path / "gpu.json").read_text())["rows"]["broken"]["failed"]


def test_fast_run_with_other_losses_is_named():
    dense, coded = {"same_as": "llama_8b dense"}, {"same_as": "llama_8b quantised"}
    rows = {
        "compiled": dense | {"losses": [11.8, 11.7]},
        "eager": dense | {"losses": [11.81, 11.69, 11.6]},
        "wrong": dense | {"losses": [11.8, 9.0]},
        "NF4": coded | {"losses": [14.0, 13.9]},
        "failed": {"failed": "out of memory"},
    }
    assert wrong_losses(rows) == ["wrong: losses are off those of compiled by 23.1%"]
