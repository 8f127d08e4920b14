"""The price of a sweep is told before it runs: the same numbers as one estimate and one run at a time."""

import json
from pathlib import Path

import pytest
from tiny_runs import TINY, tiny_config

from lightning_peft.__main__ import main
from lightning_peft.cluster.partitions import Partition, gpu_gib, parsed
from lightning_peft.commands.price_sweep import Price, fits_in
from lightning_peft.commands.train import train

WORDS = [*TINY, "data.packing=false", "trainer.max_steps=10", "cluster=local"]


def priced(tmp_path: Path, *words: str) -> dict:
    output = tmp_path / "prices.json"
    assert main(["estimate", "-m", *WORDS, f"output={output}", *words]) == 0
    return json.loads(output.read_text())


@pytest.mark.slow
def test_prices_are_those_of_single_estimates_and_measured_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    report = priced(tmp_path, "adapter.rank=4,8")
    assert [trial["trial"] for trial in report["trials"]] == ["rank4", "rank8"]
    assert "hours are not known" in capsys.readouterr().out and report["device_hours"] is None
    for rank, trial in zip((4, 8), report["trials"], strict=True):
        single = tmp_path / f"{rank}.json"
        assert main(["estimate", *TINY, "data.packing=false", f"adapter.rank={rank}", f"output={single}"]) == 0
        assert trial["peak"] == json.loads(single.read_text())["peak"]
    assert not (tmp_path / "sweeps").exists()

    result = train(
        tiny_config(tmp_path / "runs" / "before", "data.packing=false", "adapter.rank=8", "trainer.max_steps=4")
    )
    report = priced(tmp_path, "adapter.rank=4,8")
    tokens = 10 * result["data"]["tokens"] / 24  # one row a step
    for trial in report["trials"]:
        assert trial["steps"] == 10 and trial["tokens"] == pytest.approx(tokens)
        assert trial["hours"] == pytest.approx(tokens / result["tokens_per_second"] / 3600)
    assert report["trials"][0]["source"] == "measured in runs/before, of rank 8"
    assert report["device_hours"] == pytest.approx(sum(trial["hours"] for trial in report["trials"]))


def test_dry_run_of_a_sweep_prints_prices_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["submit", "-m", *WORDS, "adapter.rank=4,8", "dry_run=true", "sweep_dir=planned"]) == 0
    printed = capsys.readouterr().out
    assert "rank4" in printed and "2 trials" in printed
    assert not list(tmp_path.iterdir())


def test_modelled_rate_is_a_share_of_the_peak(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["adapter.rank=4,8", "trainer.accelerator=gpu", "price.gpu=H100", "price.utilization=0.5"]
    report = priced(tmp_path, *words)
    single = tmp_path / "one.json"
    assert (
        main(["estimate", *TINY, "data.packing=false", "adapter.rank=4", "trainer.accelerator=gpu", f"output={single}"])
        == 0
    )
    one, trial = json.loads(single.read_text()), report["trials"][0]
    seconds = trial["tokens"] * one["flops"] / one["tokens"] / (0.5 * 989e12)
    assert trial["hours"] == pytest.approx(seconds / 3600)


def test_wrong_trial_is_named_before_anything_is_priced(tmp_path, capsys):
    assert main(["estimate", "-m", *WORDS, "adapter.rank=4,0"]) == 2
    assert "adapter.rank=0: a rank is at least 1" in capsys.readouterr().err


SINFO = {
    "gpu*|4|64|515000|gpu:a100:8(S:0-1)|2-00:00:00": Partition("gpu", 4, 64, 515000 / 1024, "a100", 8, 2880),
    "debug|1|8+|32000+|(null)|30:00": Partition("debug", 1, 8, 32000 / 1024, None, 0, 30),
    "any|2|16|64000|gpu:2|infinite": Partition("any", 2, 16, 64000 / 1024, "", 2, None),
}


@pytest.mark.parametrize("line", SINFO)
def test_sinfo_is_read(line):
    assert parsed(line) == SINFO[line]


def test_gpus_are_known_by_many_spellings():
    names = {
        "a100": 40, "A100-SXM4-80GB": 80, "nvidia_h100_80gb_hbm3": 80, "l40s": 48, "v100": 16, "abacus": None,
        "a100_3g.20gb": 20, "1g.10gb": 10, "rtx_a4000": None, "t400": None, "rtx_a6000": 48, "a10g": 24,
    }  # fmt: skip
    assert {name: gpu_gib(name) for name in names} == names


def test_trial_fits_where_its_ranks_have_the_memory(tmp_path):
    run = tiny_config(tmp_path)
    gpu, debug, untold = SINFO.values()
    small = Price("t", 30 * 2**30, 1, "cuda", 1, 1.0, None, "")
    large = Price("t", 60 * 2**30, 1, "cuda", 1, 1.0, None, "")
    assert [fits_in(small, run, place) for place in (gpu, debug, untold)] == [True, False, None]
    assert fits_in(large, run, gpu) is False
    on_cpus = Price("t", 40 * 2**30, 1, "cpu", 1, 1.0, None, "")
    assert [fits_in(on_cpus, run, place) for place in (gpu, debug)] == [True, False]
