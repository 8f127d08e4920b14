"""The base that an adapter belongs to."""

import json
import logging
from importlib.metadata import version
from pathlib import Path

import pytest

from lightning_peft.checkpoint.lineage import Lineage, LineageError, check_lineage, read_lineage, write_lineage

BASE, OTHER = "a" * 64, "b" * 64
LINEAGE = Lineage(BASE, "tiny", "lora_fa", "nf4", config={"seed": 1, "adapter": {"rank": 4}}, data_fingerprint="data-1")


def test_lineage_round_trip(tmp_path: Path) -> None:
    write_lineage(LINEAGE, tmp_path)

    assert read_lineage(tmp_path) == LINEAGE
    assert json.loads((tmp_path / "lineage.json").read_text())["versions"]["torch"] == version("torch")


def test_another_base_is_an_error_naming_both(tmp_path: Path) -> None:
    write_lineage(LINEAGE, tmp_path)

    with pytest.raises(
        LineageError, match=r"trained on tiny \(weights a{12}\), the model loaded is big \(weights b{12}\)"
    ):
        check_lineage(tmp_path, OTHER, "nf4", "big")


def test_same_base_passes_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_lineage(LINEAGE, tmp_path)
    caplog.set_level(logging.INFO)

    assert check_lineage(tmp_path, BASE, "nf4") == LINEAGE
    assert caplog.records == []


def test_other_quantization_is_logged_not_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_lineage(LINEAGE, tmp_path)
    caplog.set_level(logging.INFO)

    check_lineage(tmp_path, BASE, "none")

    assert "quantization.kind=nf4, this one has none" in caplog.text


def test_folder_without_lineage_is_accepted_with_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    assert check_lineage(tmp_path, BASE, "none") is None
    assert "has no lineage.json" in caplog.text and len(caplog.records) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"base_name": "tiny"}'])
def test_damaged_lineage_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "lineage.json").write_text(content)

    with pytest.raises(LineageError, match="lineage.json: ") as caught:
        read_lineage(tmp_path)

    assert "\n" not in str(caught.value)


def test_fields_of_a_later_version_are_ignored(tmp_path: Path) -> None:
    write_lineage(LINEAGE, tmp_path)
    path = tmp_path / "lineage.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"moon_phase": "full"}))

    assert read_lineage(tmp_path) == LINEAGE
