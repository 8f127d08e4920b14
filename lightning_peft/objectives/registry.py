"""The table of objectives: each row is written in the objective's own file."""

from lightning_peft.objectives import distill, kto, preference, reward, sft
from lightning_peft.objectives.objective import Objective
from lightning_peft.objectives.reference import KL

OBJECTIVES: dict[str, Objective] = {
    "sft": sft.OBJECTIVE,
    "distill": distill.OBJECTIVE,
    "dpo": preference.DPO,
    "ipo": preference.IPO,
    "kto": kto.OBJECTIVE,
    "orpo": preference.ORPO,
    "reward": reward.OBJECTIVE,
    "simpo": preference.SIMPO,
}
"""Name -> row. `OBJECTIVES["mine"] = Objective(...)` adds one from outside the package."""


def validation_numbers(name: str) -> list[str]:
    """Name what a validation of an objective gives beside its loss; empty for one that is not known."""
    if (row := OBJECTIVES.get(name)) is None:
        return []
    return [f"validation_{measured}" for measured in (*row.logs, *((KL,) if row.uses_reference else ()))]
