"""The table of objectives: each row is written in the objective's own file."""

from lightning_peft.objectives import distill, kto, preference, sft
from lightning_peft.objectives.objective import Objective

OBJECTIVES: dict[str, Objective] = {
    "sft": sft.OBJECTIVE,
    "distill": distill.OBJECTIVE,
    "dpo": preference.DPO,
    "ipo": preference.IPO,
    "kto": kto.OBJECTIVE,
    "orpo": preference.ORPO,
    "simpo": preference.SIMPO,
}
"""Name -> row. `OBJECTIVES["mine"] = Objective(...)` adds one from outside the package."""
