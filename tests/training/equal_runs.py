"""The files that have to be the same for a run that was disturbed and one that was not."""

import csv
import json
from pathlib import Path

from safetensors.torch import load_file

COMPARED = ("step", "loss", "grad_norm", "lr", "tokens", "supervised_tokens", "validation_loss")


def rows(run_dir: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run_dir / "metrics.csv").read_text().splitlines()))


def compared_rows(run_dir: Path) -> list[dict[str, str]]:
    return [{key: row[key] for key in COMPARED} for row in rows(run_dir)]


def assert_equal_runs(disturbed: Path, undisturbed: Path) -> None:
    for name in ("adapter/adapter_model.safetensors", "adapter_best/adapter_model.safetensors"):
        ours, expected = load_file(disturbed / name), load_file(undisturbed / name)
        assert ours.keys() == expected.keys()
        assert all((ours[key] == expected[key]).all() for key in expected), name
    assert compared_rows(disturbed) == compared_rows(undisturbed)
    ours, expected = (json.loads((run / "result.json").read_text()) for run in (disturbed, undisturbed))
    assert [ours[key] for key in ("status", "steps", "train_loss", "validation_loss")] == [
        expected[key] for key in ("status", "steps", "train_loss", "validation_loss")
    ]
