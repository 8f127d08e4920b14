"""IA3: activations rescaled by trained vectors (Liu et al. 2022, arXiv:2205.05638)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter, AdapterConfig, Target
from lightning_peft.adapters.layer_names import FEED_FORWARD_OUT, matches
from lightning_peft.adapters.method import Contract, Method, PeftSpelling, Shapes, linears
from lightning_peft.quantization.weights import dense_weight, linear_shape


@dataclass
class IA3Config(AdapterConfig):
    method: str = "ia3"
    target_modules: Any = "key_value_down"
    """Layers rescaled; the paper takes keys, values and the inner activation of the feed-forward."""
    rank: int | None = None
    feed_forward: list[str] = field(default_factory=lambda: list(FEED_FORWARD_OUT))
    """Layers rescaled at their input instead of their output: names, globs and `re:` patterns."""

    uses_rank: ClassVar[bool] = False
    uses_alpha: ClassVar[bool] = False


class IA3Linear(Adapter):
    """y = l * (W x + bias), or y = W (l * x) + bias around a feed-forward output layer (section 3.3).

    `ia3_l` is fp32 and starts at one: (out_features, 1), or (1, in_features) on inputs.
    """

    def __init__(self, base_layer: nn.Module, target: Target, config: IA3Config):
        super().__init__(base_layer)
        self.scales_input = any(matches(pattern, target.name) for pattern in config.feed_forward)
        out_features, in_features = linear_shape(base_layer)
        shape = (1, in_features) if self.scales_input else (out_features, 1)
        self.ia3_l = nn.Parameter(torch.empty(shape, device=next(base_layer.parameters()).device, dtype=torch.float32))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.ia3_l)

    def base_input(self, x: Tensor) -> Tensor:
        return self._rescale(x) if self.scales_input else x

    def adapt(self, x: Tensor, base_output: Tensor) -> Tensor:
        return base_output if self.scales_input else self._rescale(base_output)

    def _rescale(self, x: Tensor) -> Tensor:
        # l is near one: l - 1 keeps the digits that bf16 would drop from l.
        return torch.addcmul(x, x, (self.ia3_l.flatten() - 1).to(x.dtype))

    def delta_weight(self) -> Tensor:
        return dense_weight(self.base_layer).float() * (self.ia3_l.float() - 1)

    def delta_bias(self) -> Tensor | None:
        bias = self.base_layer.bias
        if self.scales_input or not isinstance(bias, Tensor):
            return None
        return bias.float() * (self.ia3_l.float().flatten() - 1)


def write_feed_forward(layers: Mapping[str, Adapter], words: dict[str, Any]) -> dict[str, Any]:
    """Name the layers rescaled at their input. HF wants each to be a word of target_modules too."""
    at_input = {name for name, layer in layers.items() if isinstance(layer, IA3Linear) and layer.scales_input}
    leaves = {name.rpartition(".")[2] for name in at_input}
    if leaves <= set(words["target_modules"]) and at_input == {n for n in layers if n.rpartition(".")[2] in leaves}:
        return {"feedforward_modules": sorted(leaves)}
    return {"feedforward_modules": sorted(at_input), "target_modules": sorted(layers)}


def read_feed_forward(words: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Read the layers rescaled at their input: their vector has shape (1, in_features)."""
    return {"feed_forward": sorted(name for name, shape in shapes.items() if shape[0] == 1)}


METHOD = Method(
    IA3Config,
    linears(IA3Linear),
    trained=("ia3_l",),
    change="inputs or outputs rescaled",
    paper="arXiv:2205.05638",
    count="d or k",
    peft=PeftSpelling("IA3", ("ia3_l",), rank_word=None, write_more=write_feed_forward, read_more=read_feed_forward),
    contract=Contract(trained=lambda t: t.in_features if t.name.endswith("down_proj") else t.out_features),
)
