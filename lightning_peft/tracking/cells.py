"""The content of a cell of metrics.csv, which a run may be writing while it is read."""

import math


def number_of(cell: str | None) -> float | None:
    """Return the finite number in a cell; None where there is none, as in one that a kill cut short."""
    try:
        number = float(cell or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None
