"""LR-LoRA: a low-rank product bent element by element, so that each layer finds its own rank (Garg et al. 2026).

The paper, arXiv:2606.04325, applies a learned nonlinearity in a sinc basis to B A. The paper's grid, start and final
equations were not published with it: they are a reconstruction of ours here.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter, AdapterConfig, LowRank, Target
from lightning_peft.adapters.method import Contract, Method, linears
from lightning_peft.kernels.frozen_linear import GIVEN, Base
from lightning_peft.kernels.sinc import Grid, sinc_product
from lightning_peft.quantization.weights import linear_shape


@dataclass
class LRLoRAConfig(AdapterConfig):
    method: str = "lr_lora"
    dropout: float = 0.0
    """Probability of dropping an input."""
    nodes: int = 8
    """Functions of the sinc basis, each with a coefficient for every layer (a reconstruction: the paper's count was not
    found)."""
    reach: float = 0.8
    """The nodes lie evenly from -reach to reach times the width, which starts at 1 / sqrt(in_features) (a
    reconstruction)."""
    share: str = "layer"
    """Owner of the coefficients: layer, each its own; or model, one set for all layers, as an ablation of the paper has
    it. Widths stay the layers' own (a reconstruction)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapter.dropout={self.dropout}: must be in [0, 1)")
        if self.nodes < 2:
            raise ValueError(f"adapter.nodes={self.nodes}: must be at least 2, the ends of the grid")
        if not self.reach > 0:
            raise ValueError(f"adapter.reach={self.reach}: must be above 0")
        if self.share not in ("layer", "model"):
            raise ValueError(f"adapter.share={self.share}: must be layer or model")

    @property
    def tied(self) -> tuple[str, ...]:
        return ("lora_c",) if self.share == "model" else ()

    @property
    def grid(self) -> Grid:
        """Return the nodes in units of the width."""
        return Grid(-self.reach, 2 * self.reach / (self.nodes - 1), self.nodes)


class LRLoRALinear(Adapter):
    """y = W x + scaling * phi(B A) x, with phi(z) = z + w sum_i c_i [sinc((z/w - t_i)/h) - sinc(t_i/h)] by element.

    `lora_A` (rank, in_features) and `lora_B` (out_features, rank) start as LoRA's; `lora_c` (nodes,) starts at zero,
    where the change is LoRA's, and the logarithm of the width, `lora_log_width` (1,), at log(1 / sqrt(in_features)).
    With `share=model` all layers have one `lora_c`.
    phi(0) is 0 for all c, so the layer starts as its base, and phi(B A) has any rank once c has moved.
    """

    def __init__(self, base_layer: nn.Module, target: Target, config: LRLoRAConfig):
        super().__init__(base_layer)
        assert target.rank is not None and target.alpha is not None
        out_features, self.in_features = linear_shape(base_layer)
        device = next(base_layer.parameters()).device
        self.rank = rank = target.rank
        self.scaling = target.alpha / rank
        self.dropout = config.dropout
        self.grid = config.grid
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=torch.float32))
        self.lora_c = nn.Parameter(torch.empty(config.nodes, device=device, dtype=torch.float32))
        self.lora_log_width = nn.Parameter(torch.empty(1, device=device, dtype=torch.float32))

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        nn.init.zeros_(self.lora_c)
        nn.init.constant_(self.lora_log_width, -math.log(self.in_features) / 2)

    def adapt(self, x: Tensor, base_output: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout, self.training).to(base_output.dtype)
        return base_output + F.linear(dropped, self.delta_weight().to(dropped.dtype))

    def fused(self, x: Tensor, base: Base) -> Tensor | None:
        if base.form != GIVEN:
            return None
        dropped = F.dropout(x, self.dropout, self.training).to(base.dtype)
        product = sinc_product(dropped, self.lora_A, self.lora_B, self.lora_c, self.lora_log_width.exp(), self.grid)
        return torch.add(base.first, product, alpha=self.scaling)

    def delta_weight(self) -> Tensor:
        z, width = self.lora_B @ self.lora_A, self.lora_log_width.exp()
        change = z
        for node, c in enumerate(self.lora_c):
            t = self.grid.first + node * self.grid.step
            change = change + width * c * (
                torch.sinc((z / width - t) / self.grid.step) - torch.sinc(z.new_tensor(t / self.grid.step))
            )
        return self.scaling * change

    def low_rank(self) -> LowRank | None:
        """Return B A while every coefficient is zero; a bent product is no low-rank sum."""
        if self.lora_c.any():
            return None
        return LowRank(self.lora_A.detach().float(), self.lora_B.detach().float(), self.scaling)


METHOD = Method(
    LRLoRAConfig,
    linears(LRLoRALinear),
    trained=("lora_A", "lora_B", "lora_c", "lora_log_width"),
    change="s phi(B A), phi a sinc basis learned for each layer",
    paper="arXiv:2606.04325",
    reconstruction="the nodes of the sinc basis, their spacing, the start and the subtraction that keeps phi(0) = 0; "
    "what layers have in common with adapter.share=model",
    count="r (d + k) + 9",
    contract=Contract(trained=lambda t: t.rank * (t.out_features + t.in_features) + 9),
)
