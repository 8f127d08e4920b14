"""Trials that `sweep.together=auto` puts into one process: what they take fits, whichever they are."""

import pytest
from tiny_runs import TINY, tiny_config

from lightning_peft.commands.most_together import most_that_fit
from lightning_peft.commands.step_estimate import estimate_of
from lightning_peft.compose import compose_config
from lightning_peft.runs.machine import GIB, RESERVED, Machine

WORDS = ["data.max_length=64", "activation_checkpointing=none"]
LARGE_RANK, MANY_ROWS = ["rank=r256", "data.micro_batch_size=1"], ["rank=r4", "data.micro_batch_size=12"]
"""The first takes more by itself, the second more beside its like: rows are in the pass, and states are not."""
CPU = Machine("cpu", 0, has_bf16=False)


def test_most_trials_are_those_of_any_kind_that_fit(tmp_path):
    large, many = (compose_config("estimate", [*TINY, *WORDS, *own]) for own in (LARGE_RANK, MANY_ROWS))
    assert estimate_of(large).peak > estimate_of(many).peak
    room = estimate_of(large, 4).peak
    assert estimate_of(many, 3).peak < room < estimate_of(many, 4).peak
    named = f"device_memory_gib={(room + RESERVED['cpu'] + 2**10) / GIB}"
    configs = [tiny_config(tmp_path / "x", *WORDS, named, *own) for own in (LARGE_RANK, MANY_ROWS)]
    assert most_that_fit([configs[0]] * 5, CPU) == 4
    assert most_that_fit([configs[0]] * 4 + configs[1:], CPU) == 3


def test_trial_that_does_not_fit_alone_is_refused(tmp_path):
    config = tiny_config(tmp_path, *WORDS, "device_memory_gib=0.501")
    with pytest.raises(ValueError, match="sweep.together=auto: a trial takes up to 0.0. GiB, and there are 0.00"):
        most_that_fit([config, config], CPU)
