"""Text that holds `${`, which OmegaConf takes for a reference to another key unless it is escaped."""

import re
from typing import Any


def escaped(value: Any) -> Any:
    """Return a value of text, lists and dictionaries in which OmegaConf reads every `${` as these two characters."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: found.group(1) * 2 + "\\${", value)
    if isinstance(value, dict):
        return {key: escaped(part) for key, part in value.items()}
    if isinstance(value, list):
        return [escaped(part) for part in value]
    return value
