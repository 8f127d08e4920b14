"""d90 from folders of runs."""

import json
from pathlib import Path

import pytest
import yaml

from lightning_peft.evaluation.intrinsic_dimension import read_dimensions

BASE_LOSS = 4.0


def write_run(folder: Path, loss: float, dimension: int | None = None, accuracy: float = 0.0, **result: object) -> Path:
    folder.mkdir(parents=True)
    adapter = {"method": "lora"} if dimension is None else {"method": "intrinsic", "dimension": dimension}
    (folder / "config.yaml").write_text(yaml.safe_dump({"adapter": adapter}))
    (folder / "result.json").write_text(json.dumps({"status": "finished", "validation_loss": loss, **result}))
    scores = {"base": {"loss": BASE_LOSS}, "adapter": {"loss": loss, "metrics": {"accuracy": accuracy}}}
    (folder / "evaluation.json").write_text(json.dumps(scores))
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Write losses 3.5, 2.25, 2.1: a quarter, 87.5 % and 95 % of a fall from 4 to 2; accuracies the other way round."""
    for dimension, loss, accuracy in [(1024, 2.1, 0.5), (64, 3.5, 0.9), (256, 2.25, 0.7)]:
        write_run(tmp_path / "sweep" / f"dimension{dimension}", loss, dimension, accuracy)
    return tmp_path / "sweep"


def test_d90_is_the_first_dimension_at_nine_tenths_of_the_fall(tmp_path: Path, sweep: Path) -> None:
    reference = write_run(tmp_path / "reference", 2.0)

    found = read_dimensions(sweep, reference, "loss", 0.9)

    assert [t.dimension for t in found.trials] == [64, 256, 1024]
    assert [t.score / found.reference for t in found.trials] == pytest.approx([0.25, 0.875, 0.95])
    assert found.d90 == 1024 and read_dimensions(sweep, reference, "loss", 0.8).d90 == 256


def test_metric_is_read_from_the_evaluations(tmp_path: Path, sweep: Path) -> None:
    reference = write_run(tmp_path / "reference", 2.0, accuracy=1.0)

    assert read_dimensions(sweep, reference, "accuracy", 0.9).d90 == 64
    with pytest.raises(ValueError, match="metric=bleu: .* has loss, accuracy"):
        read_dimensions(sweep, reference, "bleu", 0.9)


def test_no_dimension_reaches_a_better_reference(tmp_path: Path, sweep: Path) -> None:
    assert read_dimensions(sweep, write_run(tmp_path / "r", 0.5), "loss", 0.9).d90 is None


def test_unfinished_runs_are_left_out(tmp_path: Path, sweep: Path) -> None:
    write_run(sweep / "dimension2048", 0.1, 2048, status="failed")

    assert len(read_dimensions(sweep, write_run(tmp_path / "r", 2.0), "loss", 0.9).trials) == 3


def test_wrong_folders_are_named(tmp_path: Path, sweep: Path) -> None:
    reference = write_run(tmp_path / "reference", 2.0)
    with pytest.raises(ValueError, match="holds no finished run"):
        read_dimensions(tmp_path / "nothing", reference, "loss", 0.9)
    (reference / "evaluation.json").unlink()
    with pytest.raises(ValueError, match="has no evaluation.json; run lightning-peft evaluate adapter_path="):
        read_dimensions(sweep, reference, "loss", 0.9)
    with pytest.raises(ValueError, match="is no better than the base's"):
        read_dimensions(sweep, write_run(tmp_path / "bad", 5.0), "loss", 0.9)
    write_run(sweep / "lora", 1.0)
    with pytest.raises(ValueError, match="lora trained method lora, not intrinsic"):
        read_dimensions(sweep, write_run(tmp_path / "r", 2.0), "loss", 0.9)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("evaluation.json", '{"base": {}}', r"evaluation.json: has no base.loss; run lightning-peft evaluate"),
        ("evaluation.json", '{"adapter"', "evaluation.json: damaged"),
        ("result.json", "[]", "result.json: damaged"),
        ("result.json", '{"status": "finished"}', "result.json: has no validation_loss; finish the run"),
    ],
)
def test_what_a_file_lacks_is_named(tmp_path: Path, sweep: Path, file: str, text: str, said: str) -> None:
    reference = write_run(tmp_path / "reference", 2.0)
    (reference / file).write_text(text)
    with pytest.raises(ValueError, match=said):
        read_dimensions(sweep, reference, "loss", 0.9)


def test_damaged_options_of_a_trial_are_named(tmp_path: Path, sweep: Path) -> None:
    (sweep / "dimension64" / "config.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match="dimension64/config.yaml: damaged"):
        read_dimensions(sweep, write_run(tmp_path / "reference", 2.0), "loss", 0.9)
