"""`lightning-peft estimate` from the command line."""

import json
import shutil
from pathlib import Path

import pytest

from lightning_peft.__main__ import main
from lightning_peft.models.tiny import tiny_config

WORDS = ["estimate", "model=tiny", "data.micro_batch_size=8", "data.max_length=256", "hardware=cpu"]


def estimated(tmp_path: Path, *words: str) -> dict:
    output = tmp_path / "estimate.json"
    assert main([*WORDS, f"output={output}", *words]) == 0
    return json.loads(output.read_text())


def test_estimate_prints_a_table_and_writes_json(tmp_path, capsys):
    report = estimated(tmp_path, "trainer.precision=32-true")
    printed = capsys.readouterr().out
    assert report["fits"] is True and report["peak"] == max(report["phases"].values())
    for component in report["components"]:
        assert component["name"] in printed


@pytest.mark.parametrize("share", [0.8, 0.65])
def test_advice_makes_it_fit(share, tmp_path):
    words = ["method=full", "trainer.precision=32-true"]
    reserved_gib = 0.5
    words += [f"device_memory_gib={reserved_gib + share * estimated(tmp_path, *words)['peak'] / 2**30}"]
    before = estimated(tmp_path, *words)
    assert before["fits"] is False
    after = estimated(tmp_path, *words, *before["change"])
    assert after["fits"] is True and after["peak"] == before["peak_after_change"]


@pytest.mark.slow
def test_what_cannot_fit_is_said(tmp_path, capsys):
    report = estimated(tmp_path, "trainer.precision=32-true", "device_memory_gib=0.51")
    assert report["change"] is None
    assert "makes it fit" in capsys.readouterr().out


def test_a_config_is_enough_and_a_gpu_need_not_be_here(tmp_path):
    (tmp_path / "large").mkdir()
    shape = tiny_config().to_dict() | {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 40}
    (tmp_path / "large" / "config.json").write_text(json.dumps(shape))
    report = estimated(tmp_path, "model=llama_3_1_70b", f"model.path={tmp_path}/large", "hardware=gpu_24gb")
    assert report["usable"] == (24 - 0.75) * 2**30
    shutil.rmtree(tmp_path / "large")


CASES = {
    "device without memory": (["device_memory_gib=0"], "device_memory_gib=0.0: must be above 0"),
    "no model": (["model=hf", "model.path=/no/model"], "model.path=/no/model"),
    "beyond the context": (["data.max_length=9999"], "data.max_length=9999: must be at most 2048"),
    "unknown accelerator": (["trainer.accelerator=abacus"], "trainer.accelerator='abacus': must be auto"),
    "no such target": (["adapter.target_modules=[q_prj]"], "q_prj"),
    "mistyped key": (["outptu=x"], "outptu: no such option; did you mean output"),
    "no folder for the output": (["output=/no/folder/x.json"], "/no/folder/x.json"),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_gets_one_line(case, capsys):
    words, expected = CASES[case]
    assert main([*WORDS, *words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and expected in lines[0]
