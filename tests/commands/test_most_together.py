"""Trials that `sweep.together=auto` puts into one process: what they take fits, whichever they are."""

from dataclasses import replace
from typing import Any

import pytest
from tiny_runs import TINY, tiny_config

from lightning_peft.commands import most_together
from lightning_peft.commands.most_together import most_that_fit
from lightning_peft.commands.step_estimate import estimate_of, memory_key
from lightning_peft.compose import compose_config
from lightning_peft.runs.machine import GIB, RESERVED, Machine

WORDS = ["data.max_length=16", "activation_checkpointing=none"]
LARGE_RANK, MANY_ROWS = ["adapter.rank=46", "data.micro_batch_size=1"], ["rank=r4", "data.micro_batch_size=8"]
"""The first takes more by itself, the second more beside its like: rows of four are in one pass, and states are not."""
CPU = Machine("cpu", 0, has_bf16=False)


def test_most_trials_are_those_of_any_kind_that_fit(tmp_path):
    large, many = (compose_config("estimate", [*TINY, *WORDS, *own]) for own in (LARGE_RANK, MANY_ROWS))
    assert estimate_of(large).peak > estimate_of(many).peak
    room = estimate_of(large, 4).peak
    assert estimate_of(many, 3).peak < room < estimate_of(many, 4).peak
    named = f"device_memory_gib={(room + RESERVED['cpu'] + 2**10) / GIB}"
    configs = [tiny_config(tmp_path / "x", *WORDS, named, *own) for own in (LARGE_RANK, MANY_ROWS)]
    assert most_that_fit([configs[0]] * 5, CPU) == 4
    assert most_that_fit([configs[1]] * 5, CPU) == 3
    of_all = [estimate_of(kind, 3) for kind in (large, many)]
    assert of_all[1].peak + 2 * (of_all[0].of_each - of_all[1].of_each) > room  # one of many rows, two of a large rank
    assert most_that_fit([configs[0]] * 4 + configs[1:], CPU) == 2


def test_pass_of_one_kind_and_the_states_of_another_fit_both(tmp_path):
    """Long rows of a small rank take a pass by themselves, in which trials of a large rank keep their states."""
    long, large = ["rank=r4", "data.max_length=1024"], ["adapter.rank=64", "data.max_length=16"]
    configs = [
        [tiny_config(tmp_path / "x", "activation_checkpointing=none", "data.micro_batch_size=1", *own)] * count
        for own, count in ((long, 1), (large, 7))
    ]
    kinds = [
        compose_config("estimate", [*TINY, "activation_checkpointing=none", "data.micro_batch_size=1", *own])
        for own in (long, large)
    ]
    of_all = [estimate_of(kind, 8) for kind in kinds]
    room = max(estimate.peak for estimate in of_all)
    mixed = estimate_of(kinds[0], 1).peak + 7 * of_all[1].of_each
    assert mixed > room  # by what eight of either kind take
    limited = [
        replace(config, device_memory_gib=(room + RESERVED["cpu"] + 2**10) / GIB)
        for config in [*configs[0], *configs[1]]
    ]
    fitting = most_that_fit(limited, CPU)
    assert 1 < fitting < 8
    assert estimate_of(kinds[0], 1).peak + (fitting - 1) * of_all[1].of_each <= room


def test_pass_has_long_rows_of_one_kind_and_whole_adapters_of_another(tmp_path):
    """Where ranks hold slices: one row of 400 tokens and seven of 16 are one pass, which gathers all their adapters."""
    own = ["activation_checkpointing=none", "data.micro_batch_size=1"]
    sliced = [*own, "strategy=fsdp", "trainer.devices=2"]
    long, large = ["rank=r4", "data.max_length=400"], ["adapter.rank=32", "data.max_length=16"]
    kinds = [compose_config("estimate", [*TINY, *sliced, *words]) for words in (long, large)]
    one_large = estimate_of(compose_config("estimate", [*TINY, *own, *large]))
    parts = {part.name: part.largest for part in one_large.components}
    adapters, states = parts["adapters"], parts["optimiser states"]
    mixed = estimate_of(kinds[0]).peak + 7 * (adapters // 2 + states // 2 + adapters)
    room = mixed - 2**14
    assert max(estimate_of(kind, 8).peak for kind in kinds) < room
    limit = f"device_memory_gib={(room + RESERVED['cpu']) / GIB}"
    trials = [tiny_config(tmp_path / "x", *sliced, limit, *words) for words in (long, *7 * [large])]
    assert most_that_fit(trials, CPU) < 8


def test_trial_that_does_not_fit_alone_is_refused(tmp_path):
    config = tiny_config(tmp_path, *WORDS, "device_memory_gib=0.501")
    message = "sweep.together=auto: a trial takes up to 0.0. GiB, and there are 0.00; `estimate` with the words of one"
    with pytest.raises(ValueError, match=message):
        most_that_fit([config, config], CPU)
    with pytest.raises(ValueError, match="and there are 0.00 for each of 2 processes; `estimate`"):
        most_that_fit([config, config], CPU, processes=2)


OF_NO_WEIGHT = [
    "seed=3", "optimizer.lr=0.5", "optimizer.weight_decay=0.1", "schedule=linear", "schedule.warmup_steps=3",
    "adapter.alpha=4", "adapter.alpha=3", "trainer.max_steps=7", "trainer.gradient_clip_val=0.1", "data.max_rows=20",
    "checkpoint.every_n_steps=5",
]  # fmt: skip
OF_SOME_WEIGHT = [
    "rank=r4", "data.micro_batch_size=2", "data.max_length=32", "optimizer=adamw_8bit", "quantization=nf4",
    "adapter.target_modules=[q_proj]", "trainer.accumulate_grad_batches=2", "adapter.dropout=0.1",
    "activation_checkpointing=blocks", "trainer.precision=bf16-true", "strategy=ddp", "device_memory_gib=1",
]  # fmt: skip


@pytest.mark.parametrize("word", [*OF_NO_WEIGHT, *OF_SOME_WEIGHT])
def test_trials_of_one_key_have_one_estimate(word):
    plain, other = (compose_config("estimate", [*TINY, *WORDS, *own]) for own in ([], [word]))
    is_same = memory_key(plain) == memory_key(other)
    assert is_same == (word in OF_NO_WEIGHT)
    if is_same:
        assert estimate_of(plain, 4).phases == estimate_of(other, 4).phases


def test_trials_that_differ_in_nothing_of_weight_are_estimated_once(tmp_path, monkeypatch):
    asked = []

    def counted(trial: Any, together: int = 1) -> Any:
        asked.append(together)
        return estimate_of(trial, together)

    monkeypatch.setattr(most_together, "estimate_of", counted)
    config = tiny_config(tmp_path, *WORDS, "device_memory_gib=8")
    rates = [replace(config, seed=n, optimizer=replace(config.optimizer, lr=10**-n)) for n in range(1, 9)]
    larger = replace(config, adapter=replace(config.adapter, rank=64))
    assert most_that_fit([*rates, larger, larger], CPU) == 10
    assert asked == [10, 10]
