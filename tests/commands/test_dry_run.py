"""A dry run checks a run for the machine that it names."""

import pytest
import torch

from lightning_peft.__main__ import main

ROWS = '{"prompt":"Hi","completion":"Hello"}\n' * 4
CHOICES = {
    "one": [],
    "several": ["strategy=fsdp", "trainer.devices=4"],
    "nodes": ["strategy=ddp", "trainer.devices=4", "trainer.num_nodes=2"],
    "attention": ["model.attention=flex_attention", "hardware=gpu_80gb"],
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
@pytest.mark.parametrize("words", CHOICES.values(), ids=CHOICES)
def test_run_for_a_gpu_is_checked_without_one(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(ROWS)
    words = ["method=qlora", "hardware=gpu_24gb", "model=tiny", "data=rows.jsonl", "data.validation_fraction=0", *words]
    assert main(["train", *words, "dry_run=true"]) == 0
    assert "this machine has no CUDA device: the run is checked for one that has" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_run_for_a_gpu_does_not_begin_without_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(ROWS)
    assert main(["train", "hardware=gpu_24gb", "model=tiny", "data=rows.jsonl"]) == 2
    assert "use cpu or auto, or dry_run=true to check the run" in capsys.readouterr().err
