"""A run folder's memory of its runs in tracking services, `SERVICE_run.json`; readable without their packages."""

import json
import logging
import uuid
from pathlib import Path
from typing import Any

from lightning_peft.checkpoint.atomic import atomic_file
from lightning_peft.strict_json import is_copy, read_object

logger = logging.getLogger(__name__)

SERVICES = ("wandb", "mlflow", "trackio", "comet")


def record_path(run_dir: Path, service: str) -> Path:
    return run_dir / f"{service}_run.json"


def service_record(run_dir: Path, service: str) -> dict[str, Any]:
    """Return {"id", "step"}: a folder's run, its id drawn the first time, and the last step known to be written."""
    path = record_path(run_dir, service)
    if not path.exists():
        write_record(run_dir, {"id": new_id(), "step": 0}, service)
    record = read_object(path, f"delete it to log as another run of {service}")
    if not isinstance(record.get("id"), str) or not isinstance(record.get("step"), int):
        raise ValueError(f"{path}: damaged (no id and step); delete it to log as another run of {service}")
    if is_copy(path, record.get("folder")):
        logger.info("%s: a copy of %s logs to %s as a run of its own", run_dir, record["folder"], service)
        write_record(run_dir, {"id": new_id(), "step": 0}, service)
        return service_record(run_dir, service)
    return record


def new_id() -> str:
    return uuid.uuid4().hex[:12]


def write_record(run_dir: Path, record: dict[str, Any], service: str) -> None:
    with atomic_file(record_path(run_dir, service)) as path:
        path.write_text(json.dumps(record | {"folder": str(run_dir.resolve())}) + "\n")


def forget_steps(run_dir: Path, behind: int = 0) -> None:
    """Forget steps of a folder that is trained in from an earlier one again: nothing behind that counts as written."""
    for service in SERVICES:
        if record_path(run_dir, service).exists():
            record = service_record(run_dir, service)
            write_record(run_dir, record | {"step": min(record["step"], behind)}, service)
