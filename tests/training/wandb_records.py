"""Read an offline run-*.wandb file: LevelDB log framing around protobuf records, torn tails tolerated."""

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7
FULL, LAST = 1, 4


def records(path: Path) -> Iterator[Any]:
    """Yield the protobuf records of a file, checksums verified."""
    data = path.read_bytes()
    assert data[:4] == b":W&B", f"{path} is not a W&B file"
    position, pending = HEADER, b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        checksum, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        if kind == 0 and length == 0:
            position += left
            continue
        chunk = data[position + HEADER : position + HEADER + length]
        if len(chunk) < length:
            return
        plain = zlib.crc32(chunk, zlib.crc32(bytes([kind])))
        masked = (((plain >> 15) | (plain << 17)) + 0xA282EAD8) & 0xFFFFFFFF
        assert checksum in (plain, masked), "damaged record"
        pending += chunk
        position += HEADER + length
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pending)
            pending = b""
            yield record


@dataclass
class OfflineRun:
    """The records that one start of a run left in its file."""

    id: str = ""
    group: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    artifacts: list[Any] = field(default_factory=list)
    project: str = ""
    name: str = ""
    preempting: bool = False
    exit_code: int | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    alerts: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    """Text of the files that are uploaded as they grow, by name."""
    git: tuple[str, str] = ("", "")
    """Commit and remote."""

    def scalars(self, key: str) -> list[tuple[int, float]]:
        """Return (step, value) of every row that has the key."""
        return [(row["trainer/global_step"], row[key]) for row in self.rows if key in row]


def values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def offline_run(path: Path) -> OfflineRun:
    run = OfflineRun()
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.id, run.group, run.job_type = record.run.run_id, record.run.run_group, record.run.job_type
            run.tags = list(record.run.tags)
            run.project, run.name = record.run.project, record.run.display_name
            run.git = record.run.git.commit, record.run.git.remote_url
            run.config |= values(record.run.config.update)
        elif kind == "files":
            live = [file.path for file in record.files.files if file.policy == file.LIVE]
            run.files |= {name: (path.parent / "files" / name).read_text() for name in live}
        elif kind == "config":
            run.config |= values(record.config.update)
        elif kind == "history":
            run.rows.append(values(record.history.item))
        elif kind == "artifact":
            run.artifacts.append(record.artifact)
        elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            run.artifacts.append(record.request.log_artifact.artifact)
        elif kind == "summary":
            run.summary |= values(record.summary.update)
        elif kind == "alert":
            run.alerts.append(record.alert.title)
        elif kind == "preempting":
            run.preempting = True
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def offline_runs(run_dir: Path) -> list[OfflineRun]:
    """Return the starts of a run folder, oldest first."""
    files = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    return [offline_run(path) for path in sorted(files, key=lambda path: path.stat().st_mtime)]
