"""The page of benchmarks shows what the result files hold."""

import json

import pytest

from benchmarks import tables
from benchmarks.tables import MARKED, PAGE, TABLES, with_tables


def test_tables_of_the_page_are_those_of_the_result_files():
    text = PAGE.read_text()
    assert text == with_tables(text), "python benchmarks/tables.py writes the tables anew"


def test_every_result_file_of_a_table_is_shown():
    shown = {name for _, name, _ in MARKED.findall(PAGE.read_text())}
    assert {name for name in TABLES if tables.read(name)} <= shown


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "FOLDER", tmp_path)

    def write(name, rows):
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows}))

    return write


def test_methods_table_joins_quality_and_cost(results):
    results("methods", {
        "base": {"validation_loss": 1.9, "execution_accuracy": 0.0},
        "dora": {
            "trainable_parameters": 5000, "learning_rate": 0.001, "validation_loss": 0.5, "execution_accuracy": 0.25,
        },
    })  # fmt: skip
    results("methods_time", {"dora": {"time_to_lora": 1.075, "memory_to_lora": 1.2}})
    lines = with_tables("<!-- table methods -->\nold\n<!-- end -->").splitlines()
    assert lines[3] == "| no training | - | - | 1.900 | 0% | - | - |"
    assert lines[4] == "| `dora` | 5,000 | 0.001 | 0.500 | 25% | 1.07 | 1.20 |"


def test_compare_table_shows_both_sides(results):
    side = {"tokens_per_second": 200.0, "peak": {"anonymous_gib": 2.0}, "first_step_seconds": 10.4}
    other = {"tokens_per_second": 100.0, "peak": {"anonymous_gib": 4.0}, "first_step_seconds": 20.0}
    row = {
        "speedup": 2.0, "memory_ratio": 0.5, "ours": side | {"largest_loss_error": 1e-6},
        "peft": other | {"largest_loss_error": 1e-2},
    }  # fmt: skip
    results("compare", {"4x512, HF PEFT in fp32": {"losses": [1.0]}, "4x512, peft": row})
    assert TABLES["compare"]().splitlines()[2] == (
        "| 4x512 | peft | 100 | 200 | 2.00x | 4.00 | 2.00 | 0.50x | 20 / 10 | 1e-02 / 1e-06 |"
    )


def test_floor_table_has_ratios_of_neighbours(results):
    results("floor", {
        "frozen": {"seconds": [1.0, 2.0, 1.0], "peak_mib": 100.0},
        "lora": {"seconds": [1.5, 3.0, 4.0], "peak_mib": 1500.0},
    })  # fmt: skip
    assert TABLES["floor"]().splitlines()[3] == "| lora | 3.00 | 1.50x | 1.00x | 1,500 |"


def test_attention_table_is_in_milliseconds(results):
    results("attention", {"4 of 512": {"ours": 0.0384, "flash by sample": 0.065}})
    assert TABLES["attention"]().splitlines()[0] == "| samples of tokens | ours, ms | flash by sample, ms |"
    assert TABLES["attention"]().splitlines()[2] == "| 4 of 512 | 38 | 65 |"


def test_preference_table_shows_both_sides(results):
    ours = {"pairs_per_cpu_second": 0.5, "peak": {"anonymous_gib": 1.0}}
    trl = {"pairs_per_cpu_second": 0.25, "peak": {"anonymous_gib": 4.0}}
    found = {"speedup_in_cpu_seconds": 2.0, "memory_ratio": 0.25, "largest_loss_difference": 1e-6}
    results("preference", {"dpo, trl": found | {"ours": ours, "trl": trl}})
    assert TABLES["preference"]().splitlines()[2] == ("| dpo, trl | 0.25 | 0.5 | 2.00x | 4.00 | 1.00 | 0.25x | 1e-06 |")


def test_on_policy_table_has_a_dash_for_a_control_that_was_not_run(results):
    scores = {"sft": {"execution_accuracy": 0.2}, "dpo": {"execution_accuracy": 0.25}}
    results("on_policy", {"seed 0": scores | {"pairs": {"pairs": 90}, "gain": 0.05}})
    assert TABLES["on_policy"]().splitlines()[2] == "| seed 0 | 90 | 20.0% | - | 25.0% | +5.0 |"


def test_ablations_are_means_over_seeds(results):
    rows = {
        f"score, seed {seed}": {"lora": {"validation_loss": 1.0 + seed}, "random": {"validation_loss": 2.0}}
        for seed in (0, 1)
    }
    wins = {"q_proj": {"0": 0.25, "1": 0.75}, "k_proj": {"0": 0.75, "1": 0.25}}
    rows["wins, seed 0"] = {"pfn": {"validation_loss": 1.0, "wins": wins}}
    results("ablations", rows)
    lines = TABLES["ablations"]().splitlines()
    assert lines[2] == "| Hybrid-LoRA, lora: validation loss | 1.5 | 1 to 2 | 2 |"
    assert lines[4] == "| MoLF-E, pfn: validation loss | 1 | 1 to 1 | 1 |"
    assert lines[6] == "| MoLF-E, pfn: steps won by expert 1, mean of kinds | 0.5 | 0.5 to 0.5 | 1 |"
