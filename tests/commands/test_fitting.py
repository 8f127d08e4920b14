"""`activation_checkpointing=auto` takes the mode that recomputes least and fits."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lightning_peft.__main__ import main
from lightning_peft.command_configs.of_runs import EstimateConfig
from lightning_peft.commands.step_estimate import CHEAPEST_FIRST, estimate_of, with_fitting_checkpointing
from lightning_peft.compose import compose_config
from lightning_peft.runs.machine import GIB, RESERVED, Machine
from lightning_peft.training.config import ActivationCheckpointing

WORDS = ["model=tiny", "data.max_length=256", "data.micro_batch_size=8", "trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def asked() -> EstimateConfig:
    config = compose_config("estimate", [*WORDS, "activation_checkpointing=auto"])
    assert isinstance(config, EstimateConfig)
    return config


@pytest.fixture(scope="module")
def peaks(asked: EstimateConfig) -> dict[ActivationCheckpointing, int]:
    found = {mode: estimate_of(replace(asked, activation_checkpointing=mode)).peak for mode in CHEAPEST_FIRST}
    assert len(set(found.values())) > 2 and max(found.values()) == found[ActivationCheckpointing.none]
    return found


@pytest.mark.parametrize("mode", CHEAPEST_FIRST, ids=lambda mode: mode.name)
def test_the_first_that_fits_is_taken(
    mode: ActivationCheckpointing, asked: EstimateConfig, peaks: dict[ActivationCheckpointing, int]
) -> None:
    room = (peaks[mode] + RESERVED["cpu"]) / GIB
    chosen = with_fitting_checkpointing(replace(asked, device_memory_gib=room), Machine.here(asked.trainer))
    fitting = next(each for each in CHEAPEST_FIRST if peaks[each] <= peaks[mode])
    assert chosen.activation_checkpointing is fitting
    assert estimate_of(replace(asked, device_memory_gib=room)).peak == peaks[fitting]


def test_where_nothing_fits_the_smallest_is_taken_and_said(
    asked: EstimateConfig, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = with_fitting_checkpointing(
        replace(asked, device_memory_gib=0.501 + RESERVED["cpu"] / GIB - 0.5), Machine.here(asked.trainer)
    )
    assert chosen.activation_checkpointing is ActivationCheckpointing.blocks
    assert "auto: blocks, which is estimated at" in caplog.text


def test_an_unknown_device_gets_the_default(asked: EstimateConfig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    chosen = with_fitting_checkpointing(asked, Machine("cuda", None, has_bf16=True, is_here=False))
    assert chosen.activation_checkpointing is ActivationCheckpointing.elementwise
    assert "no memory of the device is known" in caplog.text


def test_a_run_keeps_what_was_chosen(tmp_path: Path) -> None:
    words = [*WORDS[:1], "data.max_rows=8", "data.max_validation_rows=2", "trainer.accelerator=cpu", "logger=none"]
    words += ["activation_checkpointing=auto", "trainer.max_steps=1", f"run_dir={tmp_path}/run"]
    assert main(["train", *words]) == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["activation_checkpointing"] == "none"
