"""JSON as its standard has it: nan and inf, which other programs cannot read, are null."""

import json
import math
from pathlib import Path
from typing import Any


def strict(value: Any) -> Any:
    """Return the value with null for the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: strict(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [strict(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(value: Any) -> str:
    """Return a value as the text of a file."""
    return json.dumps(strict(value), indent=2, allow_nan=False) + "\n"


def json_line(value: Any) -> str:
    """Return a value as a line of a file of lines, without the line's end; other scripts stay readable."""
    return json.dumps(strict(value), ensure_ascii=False, allow_nan=False)


def is_copy(path: Path, folder: str | None) -> bool:
    """Return whether a file was copied from `folder`, where it was written and still is; a moved file is no copy."""
    if not folder or Path(folder) == path.resolve().parent:
        return False
    original = Path(folder) / path.name
    return original.is_file() and not original.samefile(path)


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """Return what a file holds, which is one of ours. Raises ValueError with the remedy for a damaged file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{path}: damaged ({error}); {remedy}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: damaged (no object of JSON); {remedy}")
    return found
