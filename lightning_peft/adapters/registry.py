"""The table of methods: each row is written in the method's own file."""

from lightning_peft.adapters import (
    adalora,
    balora,
    dora,
    full,
    hira,
    hybrid_lora,
    ia3,
    intrinsic,
    lora,
    lora_fa,
    lr_lora,
    lr_lora_gate,
    miss,
    molf,
    molf_e,
    vera,
)
from lightning_peft.adapters.method import Method

METHODS: dict[str, Method] = {
    "adalora": adalora.METHOD,
    "dora": dora.METHOD,
    "full": full.METHOD,
    "hira": hira.METHOD,
    "hybrid_lora": hybrid_lora.METHOD,
    "ia3": ia3.METHOD,
    "intrinsic": intrinsic.METHOD,
    "lora": lora.METHOD,
    "lora_fa": lora_fa.METHOD,
    "lr_lora": lr_lora.METHOD,
    "lr_lora_gate": lr_lora_gate.METHOD,
    "miss": miss.METHOD,
    "molf": molf.METHOD,
    "molf_e": molf_e.METHOD,
    "vera": vera.METHOD,
    "balora": balora.METHOD,
}
"""Name -> row; among methods whose folders look alike, the one that others are kinds of stands first.

`METHODS["mine"] = Method(...)` adds one from outside the package."""
