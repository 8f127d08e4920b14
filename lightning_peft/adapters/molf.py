"""MoLF: full fine-tuning and LoRA beside it, of which the optimiser moves one for each layer a step (Tang et al. 2026).

arXiv:2605.07111; the equations are those of the authors' code (11785T23/molf). A layer's weight is an expert as its
LoRAs are; embeddings and norms train as they are. The routing is the optimiser's: optim/routed_adamw.py.
"""

from dataclasses import dataclass, field
from typing import Any

from lightning_peft.adapters.method import Contract, Method, linears, only_written
from lightning_peft.adapters.molf_e import METHOD as MOLF_E
from lightning_peft.adapters.molf_e import MoLFEConfig, MoLFELinear


@dataclass
class MoLFConfig(MoLFEConfig):
    method: str = "molf"
    expert_ranks: list[int] = field(default_factory=lambda: [128])
    """Rank of each LoRA beside a layer's weight; the authors' run has one of 128."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("layers", "trainable_modules", "init_from"):
            value: Any = getattr(self, option)
            if value:
                raise ValueError(f"adapter.{option}={value!r}: method molf trains every weight; leave it out")

    @property
    def least_experts(self) -> int:
        return 1


assert MOLF_E.peft is not None
METHOD = Method(
    MoLFConfig,
    linears(MoLFELinear),
    trains_base=True,
    trained=("lora_A.0", "lora_B.0"),
    change="every weight, and sum of s_i B_i A_i, the optimiser moving W or one of them a step",
    paper="arXiv:2605.07111",
    count="d k + sum of r_i (d + k)",
    peft=only_written(MOLF_E.peft),
    contract=Contract(options={"expert_ranks": [4], "expert_alpha": 4.0}),
)
