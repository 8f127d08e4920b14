"""JSON as its standard has it: nan and inf, which other programs cannot read, are null."""

import json
import math
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
