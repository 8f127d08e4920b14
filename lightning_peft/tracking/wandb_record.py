"""What a run folder remembers of its W&B run, `wandb_run.json`; readable without wandb."""

import json
import uuid
from pathlib import Path
from typing import Any

from lightning_peft.checkpoint.atomic import atomic_file


def record_path(run_dir: Path) -> Path:
    return run_dir / "wandb_run.json"


def wandb_record(run_dir: Path) -> dict[str, Any]:
    """{"id", "step"}: the W&B run of a folder, drawn the first time it is asked for, and the last step known to be
    written."""
    path = record_path(run_dir)
    if not path.exists():
        write_record(run_dir, {"id": uuid.uuid4().hex[:12], "step": 0})
    record = json.loads(path.read_text())
    assert isinstance(record, dict)
    return record


def write_record(run_dir: Path, record: dict[str, Any]) -> None:
    with atomic_file(record_path(run_dir)) as path:
        path.write_text(json.dumps(record) + "\n")


def forget_steps(run_dir: Path) -> None:
    """For a folder that is trained in from step 0 again: nothing of it is written yet."""
    if record_path(run_dir).exists():
        write_record(run_dir, wandb_record(run_dir) | {"step": 0})
