"""LoRA whose rank is learned by gates: every direction is kept or dropped, layer by layer.

The method is the literal reading of "learns the rank of each layer", for a plain LoRA as the result; LR-LoRA itself
(arXiv:2606.04325) bends the product instead. The gates are hard-concrete ones (Louizos et al. 2018, arXiv:1712.01312).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.adapters.base import LowRank, Target
from lightning_peft.adapters.lora import PEFT, LoRAConfig, LoRALinear
from lightning_peft.adapters.method import Contract, Method, linears, only_written
from lightning_peft.kernels.frozen_linear import GIVEN, Base
from lightning_peft.kernels.low_rank import add_low_rank

TEMPERATURE = 2 / 3
LOW, HIGH = -0.1, 1.1
"""Sharpness of the gates and the interval they are stretched to before they are clamped to [0, 1], as Louizos et al."""
START = 2.0
"""log alpha of a fresh gate, which stands at 0.957: inside the interval, where it has a gradient. Ours."""


@dataclass
class LRLoRAGateConfig(LoRAConfig):
    method: str = "lr_lora_gate"
    penalty: float = 0.01
    """Loss for each direction of a layer that is open, by its probability, as a mean over the layers (ours)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.penalty >= 0:
            raise ValueError(f"adapter.penalty={self.penalty}: must be 0 or more")
        if not self.initialization.is_neutral:
            raise ValueError(f"adapter.init={self.init}: gates drop directions that the base has lost; use kaiming")


class LRLoRAGateLinear(LoRALinear):
    """y = W x + scaling * B diag(g) A x, a gate g_j in [0, 1] for each direction, drawn anew in every training step.

    g = clamp(1.2 sigmoid((logit(u) + `lora_gate`) / (2/3)) - 0.1) with u uniform in training, and without the noise
    elsewhere. `lora_gate` is (rank,) fp32; the scaling stays that of the first rank.
    """

    def __init__(self, base_layer: nn.Module, target: Target, config: LRLoRAGateConfig):
        super().__init__(base_layer, target, config)
        self.penalty = config.penalty
        self.lora_gate = nn.Parameter(torch.empty(self.rank, device=self.lora_A.weight.device, dtype=torch.float32))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.lora_gate, START)

    def gates(self, drawn: bool) -> Tensor:
        """Return the gates (rank,), drawn for one step or as they stand without noise."""
        logits: Tensor = self.lora_gate
        if drawn:
            logits = (torch.logit(torch.rand_like(logits), eps=1e-6) + logits) / TEMPERATURE
        return (logits.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return diag(g) A and B, the gates drawn in training."""
        return self.gates(self.training)[:, None] * self.lora_A.weight, self.lora_B.weight

    def fused(self, x: Tensor, base: Base) -> Tensor | None:
        if self.active_dropout and base.form != GIVEN:
            return None  # the formula drops inputs before it draws the gates
        x = F.dropout(x, self.active_dropout)
        return add_low_rank(base, x, *self.factors(), self.scaling)

    def delta_weight(self) -> Tensor:
        A = self.gates(drawn=False)[:, None] * self.lora_A.weight
        return self.scaling * (self.lora_B.weight.float() @ A.float())

    def regularization(self) -> Tensor:
        """Return the penalty for the directions expected to be open   (Louizos et al., eq. 12)."""
        shift = TEMPERATURE * torch.log(self.lora_gate.new_tensor(-LOW / HIGH))
        return self.penalty * (self.lora_gate - shift).sigmoid().sum()

    @torch.no_grad()
    def published(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a plain LoRA of the open directions, each gate in its column of B; at least one direction."""
        gates = (tensors["lora_gate"].float().sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)
        kept = gates > 0
        kept[0] |= not kept.any()  # a LoRA of rank 0 is none
        rest = {name: tensor for name, tensor in tensors.items() if name != "lora_gate"}
        A, B = tensors["lora_A.weight"][kept], (tensors["lora_B.weight"] * gates)[:, kept]
        return rest | {"lora_A.weight": A.contiguous(), "lora_B.weight": B.contiguous()}

    def low_rank(self) -> LowRank:
        names = ("lora_A.weight", "lora_B.weight", "lora_gate")
        tensors = self.published({name: self.get_parameter(name).detach() for name in names})
        return LowRank(tensors["lora_A.weight"].float(), tensors["lora_B.weight"].float(), self.scaling)


METHOD = Method(
    LRLoRAGateConfig,
    linears(LRLoRAGateLinear),
    trained=("lora_A.weight", "lora_B.weight", "lora_gate"),
    change="s B diag(g) A, hard-concrete gates g that close",
    paper="arXiv:1712.01312, 2606.04325",
    reconstruction="all of it: the paper of LR-LoRA bends B A, and gates are another reading of its abstract",
    count="r (d + k) + r",
    cannot_shard="its penalty reads the gates outside the forward pass, where they are sharded",
    peft=only_written(PEFT),
    contract=Contract(trained=lambda t: t.rank * (t.out_features + t.in_features) + t.rank),
)
