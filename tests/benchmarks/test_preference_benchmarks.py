"""DPO beside TRL's on the same pairs, and DPO on an adapter's own answers, small."""

import json
from collections import Counter

import pytest
import torch

from benchmarks import ablations, on_policy, preference
from benchmarks.preference import summarise, write_pairs
from benchmarks.tables import figures_of_ablation
from benchmarks.workloads import write_steps
from lightning_peft.adapters.hybrid_lora import SCORES


def side(cpu_seconds, loss, peak):
    return {"cpu_seconds": cpu_seconds, "seconds": cpu_seconds, "losses": [loss] * 5, "peak": {"anonymous_gib": peak}}


def test_rates_are_of_the_steps_between_warm_up_and_end():
    sides = {"ours": side([9.0, 9.0, 1.0, 2.0, 9.0], 0.7, 1.0), "trl": side([1.0, 1.0, 3.0, 4.0, 1.0], 0.7, 4.0)}
    row = summarise(sides, [1, 1, 2, 8, 1], 1e-4)
    assert row["ours"]["pairs_per_cpu_second"] == 3.0 and row["trl"]["pairs_per_cpu_second"] == pytest.approx(4 / 3)
    assert (row["speedup_in_cpu_seconds"], row["memory_ratio"]) == (2.5, 0.25)


def test_other_losses_are_no_result():
    sides = {"ours": side([1.0] * 5, 0.7, 1.0), "trl": side([1.0] * 5, 0.71, 4.0)}
    with pytest.raises(RuntimeError, match=r"losses differ by 0.01: .* and TRL's"):
        summarise(sides, [1] * 5, 1e-3)


def test_padded_pairs_hold_the_samples_of_a_step(tmp_path):
    rival = pytest.importorskip("benchmarks.preference_rival")
    write_steps(["model=tiny", *write_pairs(tmp_path, 1, 1024)], tmp_path, 1)
    (step,) = json.loads((tmp_path / "steps.json").read_text())
    found = rival.pad_pairs([{key: [row[key] for row in step] for key in ("input_ids", "labels")}])
    assert len(step) > 2 and len(found["input_ids"]) == len(step)
    for place, sample in enumerate([*step[::2], *step[1::2]]):
        kept = found["attention_mask"][place].bool()
        assert found["input_ids"][place][kept].tolist() == sample["input_ids"]
        answers = found["input_ids"][place][found["completion_mask"][place].bool()]
        assert answers.tolist() == [label for label in sample["labels"] if label != -100]
    prompts = (found["attention_mask"] - found["completion_mask"]).sum(1)
    assert torch.equal(*prompts.chunk(2))  # both answers of a pair have one prompt


@pytest.mark.slow
def test_losses_are_trls_step_by_step(tmp_path, forked_starts):
    words = ["--model", "tiny", "--steps", "4", "--max-length", "1024", "--dtypes", "float32"]
    words += ["--output", f"{tmp_path}/preference.json"]
    assert preference.main(words) == 0
    row = json.loads((tmp_path / "preference.json").read_text())["rows"]["dpo, trl, float32"]
    assert row["largest_loss_difference"] < 1e-5 and row["ours"]["losses"][3] < row["ours"]["losses"][0]
    assert row["ours"]["losses"][0] == pytest.approx(0.693147, abs=1e-5) and min(row["pairs"]) > 1


@pytest.mark.slow
def test_own_pairs_are_made_trained_on_and_scored_and_go_on(tmp_path, forked_starts, capsys):
    sizes = ["--sft-steps", "2", "--asked-rows", "6", "--dpo-steps", "2", "--scored-rows", "3", "--seeds", "0"]
    # The random model has no right answer of its own.
    sizes += ["--rows", "24", "--chosen", "row", "--samples", "1", "--temperature", "0", "--pairs-per-prompt", "1"]
    words = ["--model", "tiny", *sizes, "--control", "--folder", f"{tmp_path}/runs", "--output", f"{tmp_path}/r.json"]
    assert on_policy.main(words) == 0
    row = json.loads((tmp_path / "r.json").read_text())["rows"]["seed 0"]
    assert row["pairs"]["pairs"] == 6 and set(row) == {"pairs", "sft", "dpo", "control", "gain"}
    assert row["gain"] == row["dpo"]["execution_accuracy"] - row["sft"]["execution_accuracy"]
    assert len({row[name]["loss"] for name in ("sft", "dpo", "control")}) == 3
    lines = [(tmp_path / f"runs/{name}-0.jsonl").read_text().splitlines() for name in ("learned", "asked")]
    schemas = [{json.loads(line)["schema"].partition("(")[0] for line in part} for part in lines]
    assert schemas[0] and schemas[1] and schemas[0].isdisjoint(schemas[1])
    capsys.readouterr()
    assert on_policy.main(words) == 0 and "seed 0: run before" in capsys.readouterr().out


def test_asked_rows_are_of_each_level_in_turn(tmp_path):
    found = {}
    for levels in ("drawn", "in_turn"):
        on_policy.write_rows(on_policy.Plan(rows=120, levels=levels), 0, tmp_path)
        found[levels] = [json.loads(line) for line in (tmp_path / "asked-0.jsonl").read_text().splitlines()]
    counts = {levels: Counter(row["level"] for row in rows[:18]) for levels, rows in found.items()}
    assert counts["in_turn"] == {"easy": 6, "medium": 6, "hard": 6} != counts["drawn"]
    assert sorted(map(repr, found["in_turn"])) == sorted(map(repr, found["drawn"]))
    with pytest.raises(SystemExit):
        on_policy.main(["--levels", "sorted", "--folder", f"{tmp_path}/none"])
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_ablations_give_figures_of_every_part_and_go_on(tmp_path, capsys):
    words = ["--steps", "2", "--rows", "4", "--seeds", "0", "--output", f"{tmp_path}/ablations.json"]
    assert ablations.main(words) == 0
    rows = json.loads((tmp_path / "ablations.json").read_text())["rows"]
    assert set(rows["score, seed 0"]) == {"lora", *SCORES} and rows["score, seed 0"]["random"]["chosen"]
    assert {name for name, _ in figures_of_ablation("calibration", rows["calibration, seed 0"])} >= {
        "balora, mean: ece", "balora, 8 draws: ece", "lora, ensemble of 2: nll",
    }  # fmt: skip
    assert set(rows["wins, seed 0"]) == {"epd", "pfn"}
    for found in rows["wins, seed 0"].values():
        for wins in found["wins"].values():
            assert sum(wins.values()) == pytest.approx(1)
    assert all(value >= 0 for _, value in figures_of_ablation("share", rows["share, seed 0"]))
    capsys.readouterr()
    assert ablations.main(words) == 0 and capsys.readouterr().out.count("run before") == 4
