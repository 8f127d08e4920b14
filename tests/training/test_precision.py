"""The dtype a run computes in."""

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from lightning_peft.training.precision import (
    ComputePrecision,
    has_fast_bf16,
    precision_plugin,
    resolve_precision,
    weight_dtype,
)


def test_auto_on_a_cpu_is_what_its_hardware_multiplies():
    expected = ("bf16-true", "bf16-mixed") if has_fast_bf16("cpu") else ("32-true", "32-true")
    has_bf16 = has_fast_bf16("cpu")
    assert tuple(resolve_precision("auto", "cpu", has_bf16, trains_all) for trains_all in (False, True)) == expected


def test_compute_precision_converts_no_parameter():
    module = nn.Linear(2, 2)
    assert ComputePrecision("bf16-true").convert_module(module).weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("precision", "trains_all", "dtype"),
    [
        ("32-true", False, torch.float32),
        ("bf16-true", False, torch.bfloat16),
        ("bf16-mixed", False, torch.bfloat16),
        ("bf16-mixed", True, torch.float32),
        ("16-mixed", False, torch.float16),
        ("16-mixed", True, torch.float32),
    ],
)
def test_frozen_weights_are_loaded_in_the_computed_dtype(precision, trains_all, dtype):
    assert weight_dtype(precision, trains_all) == dtype


def test_mixed_precision_is_lightnings_autocast():
    assert isinstance(precision_plugin("bf16-mixed", "cpu"), MixedPrecision)
    assert isinstance(precision_plugin("bf16-true", "cpu"), ComputePrecision)
