"""Result files: one JSON a benchmark, written after each part, so that an interrupted one goes on where it was."""

import json
from pathlib import Path
from typing import Any

from benchmarks.machine import command_line, describe_machine, versions

FOLDER = Path(__file__).parent / "results"


class Results:
    """The rows of one benchmark by name, kept in `path` with the machine, the versions and the settings.

    Rows measured before are kept. Raises ValueError when they were measured under other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self.content: dict[str, Any] = {
            "command": command_line(),
            "settings": settings,
            "machine": describe_machine(),
            "versions": versions(),
            "rows": {},
        }
        if path.is_file():
            saved = json.loads(path.read_text())
            if saved["settings"] != settings:
                raise ValueError(
                    f"{path.name} holds rows measured with {saved['settings']}, asked for are {settings}: "
                    "give the same settings, or another --output"
                )
            self.content["rows"] = saved["rows"]

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        rows: dict[str, dict[str, Any]] = self.content["rows"]
        return rows

    def add(self, name: str, row: dict[str, Any]) -> None:
        self.rows[name] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=2) + "\n")
        partial.replace(self.path)
