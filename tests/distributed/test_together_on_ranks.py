"""Runs that share slices of one base, two processes each: every one is what it is by itself under fsdp."""

import json
from pathlib import Path

import pytest
from rank_runs import train_on_ranks
from started import run_on_ranks
from test_together import assert_as_alone, result
from tiny_runs import TINY, tiny_config

from lightning_peft.commands.together import grouped, train_together
from lightning_peft.commands.train import train

SHARDED = ["strategy=fsdp", "trainer.devices=2", "trainer.max_steps=3", "checkpoint.every_n_steps=2"]
TRIALS: dict[str, list[str]] = {
    "odd": ["adapter.rank=3", "adapter.alpha=8", "validation.every_n_steps=2"],
    "dropped": ["method=rslora", "adapter.rank=8", "adapter.dropout=0.3", "optimizer.lr=0.003", "seed=3"],
    "windows": ["data.micro_batch_size=2", "trainer.accumulate_grad_batches=3", "trainer.gradient_clip_val=0.1"],
    "frozen": ["method=lora_fa", "adapter.rank=4", "adapter.target_modules=[q_proj,down_proj]", "adapter.layers=1"],
}
"""A rank that two processes cannot cut evenly, masks, windows, and factors that do not train."""


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["quantization=none"], list(TRIALS)),
        (["quantization=nf4", "activation_checkpointing=blocks"], ["odd", "dropped"]),
    ],
    ids=["dense", "nf4"],
)
def test_each_run_under_fsdp_is_what_it_is_alone(tmp_path: Path, words: list[str], names: list[str]) -> None:
    trials = {name: [*SHARDED, *words, *TRIALS[name]] for name in names}
    configs = {name: tiny_config(tmp_path / "together" / name, *own) for name, own in trials.items()}
    assert grouped(configs, 8) == [names]
    assert train_together(list(configs.values()), tmp_path / "list.txt") == 0
    (tmp_path / "alone").mkdir()
    train_on_ranks(2, tmp_path / "alone", {name: [*TINY, *own] for name, own in trials.items()})
    for name in names:
        assert_as_alone(tmp_path / "together" / name, tmp_path / "alone" / name)
        found, expected = result(tmp_path / "together" / name), result(tmp_path / "alone" / name)
        for key in ("status", "steps", "end", "data", "trainable_parameters", "total_parameters"):
            assert found[key] == expected[key]


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_runs_that_fill_passes_take_turns_alike_on_every_rank(tmp_path: Path, strategy: str) -> None:
    """Packed rows of up to 400 tokens: two or three fill a pass, and the ranks' rows are not of one length."""
    words = [f"strategy={strategy}", "trainer.devices=2", "trainer.max_steps=4", "data.max_length=400"]
    words += ["data.packing=true", "data.micro_batch_size=1", "data.max_rows=64"]
    trials = {f"rank{rank}": [*words, f"adapter.rank={rank}", f"seed={rank}"] for rank in (2, 3, 4, 8)}
    configs = {name: tiny_config(tmp_path / "together" / name, *own) for name, own in trials.items()}
    assert grouped(configs, 8) == [list(trials)]
    assert train_together(list(configs.values()), tmp_path / "list.txt") == 0
    (tmp_path / "alone").mkdir()
    train_on_ranks(2, tmp_path / "alone", {name: [*TINY, *own] for name, own in trials.items()})
    for name in trials:
        assert_as_alone(tmp_path / "together" / name, tmp_path / "alone" / name)


@pytest.mark.slow
@pytest.mark.multi_process
def test_one_run_leaves_the_others_and_goes_on_alone(tmp_path: Path) -> None:
    trials = {name: [*SHARDED, *TRIALS[name]] for name in ("odd", "dropped")}
    early = tiny_config(tmp_path / "odd", *trials["odd"], "pause_at=1")
    assert train_together([early, tiny_config(tmp_path / "dropped", *trials["dropped"])], tmp_path / "list.txt") == 75
    assert [result(tmp_path / name)["status"] for name in trials] == ["paused", "finished"]
    train(tiny_config(tmp_path / "odd", *trials["odd"], "resume=auto"))
    train(tiny_config(tmp_path / "alone", *trials["odd"]))
    assert_as_alone(tmp_path / "odd", tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("ranks", [2, 3])  # three cannot cut its weights evenly
def test_models_around_a_sliced_base_are_it_and_hold_it_once(tmp_path: Path, ranks: int) -> None:
    run_on_ranks(ranks, Path(__file__).with_name("sliced_base_on_ranks.py"), tmp_path / "found.json")
    of_all = json.loads((tmp_path / "found.json").read_text())
    assert len(of_all) == 4 * ranks
    for found in of_all:
        assert found["parameters"] >= 20 and found["is_shared"]
        assert found["difference"] < 1e-5


@pytest.mark.multi_process
def test_run_that_fails_on_one_rank_ends_its_group_and_one_that_fails_on_all_does_not(tmp_path: Path) -> None:
    run_on_ranks(2, Path(__file__).with_name("failing_member_on_ranks.py"), tmp_path / "found.json")
    on_all, on_one = json.loads((tmp_path / "found.json").read_text())
    assert on_all == ["a full disk", "20.0"]
    assert on_one[0].startswith("first failed on rank 0 and not on all (ValueError: a full disk)")
