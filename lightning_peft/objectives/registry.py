"""The table of objectives: each row is written in the objective's own file."""

from lightning_peft.objectives import sft
from lightning_peft.objectives.objective import Objective

OBJECTIVES: dict[str, Objective] = {
    "sft": sft.OBJECTIVE,
}
"""Name -> row. `OBJECTIVES["mine"] = Objective(...)` adds one from outside the package."""
