"""Mixtures of experts whose matrices are stacked in one parameter: each stack made a layer, to adapt or to quantise.

transformers keeps a projection of all experts in one 3-D parameter that the module's own code multiplies with. An
opened module has a layer in the place of each, and a forward that feeds it the rows of every expert.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft.kernels.codes import Codes
from lightning_peft.kernels.frozen_linear import DENSE, Base
from lightning_peft.kernels.grouped import RowsPerExpert, grouped_product
from lightning_peft.quantization.linear import CodedWeight

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
"""Names of the stacks in the order in which transformers' classes have them."""
LLAMA4 = "Llama4TextExperts"
"""The class that feeds every expert all tokens, zeros for those that are not its own."""


class Stack(NamedTuple):
    """A stack of matrices, be it a parameter or a layer."""

    experts: int
    out_features: int
    in_features: int
    opens: bool
    """True where it can be made a layer: its module computes in a way known here."""

    @property
    def weights(self) -> int:
        return self.experts * self.out_features * self.in_features


class ExpertLinear(nn.Module):
    """y_e = x_e W_e^T over the experts e: a frozen stack of dense matrices.

    `weight` is the parameter as the model has it: (experts, out_features, in_features), the last two the other way
    round where `transposed`.
    """

    def __init__(self, weight: nn.Parameter, transposed: bool):
        super().__init__()
        self.weight = weight
        self.transposed = transposed

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (experts, out_features, in_features), whole where the weight is sharded."""
        experts, rows, columns = self.weight.shape
        return (experts, columns, rows) if self.transposed else (experts, rows, columns)

    def matrices(self) -> Tensor:
        """Return the weight as (experts, out_features, in_features), a view."""
        return self.weight.detach().mT if self.transposed else self.weight.detach()

    def matrix(self, expert: int) -> Tensor:
        """Return one expert's weight, (out_features, in_features), a view."""
        return self.matrices()[expert]

    def base(self, expert: int, dtype: torch.dtype) -> Base:
        """Describe one expert's matrix to a kernel that computes in `dtype`."""
        matrix = self.weight[expert]
        return Base(dtype, DENSE, 0, (matrix.t() if self.transposed else matrix, None))

    def forward(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Map rows sorted by expert, (N, in_features), to (N, out_features)."""
        return grouped_product(x, sizes, partial(self.base, dtype=product_dtype(x)), stack=self.matrices())


class QuantizedExperts(CodedWeight):
    """y_e = x_e dequantised(W_e)^T over the experts e, each quantised as a linear layer of its own would be.

    The codes have a first dimension more than those of a linear layer: the experts. `transposed` says that the dense
    parameter has its inputs first; the codes never have.
    """

    shape: tuple[int, int, int]

    def __init__(
        self,
        shape: tuple[int, int, int],
        transposed: bool = False,
        kind: str = "nf4",
        block_size: int = 64,
        double_quantization: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = "meta",
    ):
        super().__init__(shape, kind, block_size, double_quantization, dtype, device)
        self.transposed = transposed

    def matrix(self, expert: int) -> Tensor:
        """Return one expert's weight, (out_features, in_features), dequantised afresh in the layer's dtype."""
        one = (None if tensor is None else tensor[expert] for tensor in self.codes)
        return self.dequantized(Codes(*one), self.dtype)  # type: ignore[arg-type]  # as `dequantized` has it

    def base(self, expert: int, dtype: torch.dtype) -> Base:
        """Describe one expert's codes to a kernel that computes in `dtype`."""
        one = (None if tensor is None else tensor[expert] for tensor in self.codes)
        return Base(dtype, self.kind, self.block_size, (*one, None))

    def forward(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Map rows sorted by expert, (N, in_features), to (N, out_features)."""
        return grouped_product(x, sizes, partial(self.base, dtype=product_dtype(x)))


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that products with x are computed in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def projections(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's stacks that can be layers; none for one that computes in another way."""
    is_routed = hasattr(module, "has_gate") and hasattr(module, "_is_expert_parallel")
    if not is_routed and type(module).__name__ != LLAMA4:
        return ()
    return tuple(name for name in PROJECTIONS if hasattr(module, name))


CHOICE = "top_k_index"
"""Name of the argument with each token's choice in most of transformers' modules of experts."""


def routed_modules(model: nn.Module) -> dict[str, int]:
    """Return the modules of experts that are given each token's choice, by name, and how many experts each has.

    Modules may be opened or not, and may compute in a way of their own. Experts that do nothing count.
    """
    found = {}
    for name, module in model.named_modules():
        experts = getattr(module, "total_experts", getattr(module, "num_experts", None))
        is_known = bool(projections(module)) and type(module).__name__ != LLAMA4
        is_given = is_known or CHOICE in inspect.signature(module.forward).parameters
        if isinstance(experts, int) and experts > 1 and is_given:
            found[name] = experts
    return found


def has_experts(model: nn.Module) -> bool:
    """Return whether a module of the model is one of experts, known here or not."""
    return any("Expert" in type(module).__name__ for module in model.modules())


def expert_stacks(model: nn.Module) -> dict[str, Stack]:
    """Return every stack of the model by name, opened or not."""
    found: dict[str, Stack] = {}
    for prefix, module in model.named_modules():
        names = projections(module)
        for name in names:
            found[f"{prefix}.{name}"] = Stack(*stack_shape(module, name), True)
        if not names:
            for name, parameter in unknown_stacks(prefix, module):
                experts, rows, columns = parameter.shape
                found[f"{prefix}.{name}"] = Stack(experts, rows, columns, False)
    return found


def unknown_stacks(name: str, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return 3-D parameters of a module called `name` that hold a matrix for each expert, where it cannot be opened.

    Other parameters have three dimensions too: convolutions, the mixing weights of a recurrence, a vision probe.
    """
    is_own = isinstance(module, ExpertLinear | CodedWeight) or hasattr(module, "base_layer")
    if is_own or projections(module):
        return []
    words = f"{name} {type(module).__name__}".lower()
    return [
        (own, parameter)
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and ("expert" in words or "moe" in words or "expert" in own)
    ]


def stack_shape(module: nn.Module, name: str) -> tuple[int, int, int]:
    """Return (experts, out_features, in_features) of a stack, a parameter or a layer under whatever adapts it."""
    part: Any = getattr(module, name)
    if isinstance(part, nn.Parameter):
        experts, rows, columns = part.shape
        return (experts, columns, rows) if _is_transposed(module) else (experts, rows, columns)
    while hasattr(part, "base_layer"):
        part = part.base_layer
    experts, rows, columns = part.shape
    return experts, rows, columns


def _is_transposed(module: nn.Module) -> bool:
    return bool(getattr(module, "is_transposed", type(module).__name__ == LLAMA4))


def open_experts(model: nn.Module, names: Iterable[str]) -> None:
    """Make the stacks of these names layers, and with each the others of its module. Works on the meta device."""
    for holder in dict.fromkeys(name.rpartition(".")[0] for name in names):
        module: Any = model.get_submodule(holder)
        for name in projections(module):
            weight = module._parameters.pop(name, None)
            if weight is not None:  # it is not open yet
                module.add_module(name, ExpertLinear(weight, _is_transposed(module)))
        forward: Callable[..., Tensor] = _every_expert if type(module).__name__ == LLAMA4 else _routed
        module.forward = MethodType(forward, module)


def close_experts(model: nn.Module) -> None:
    """Make dense stacks parameters again, as transformers has and saves them."""
    for module in list(model.modules()):
        for name in projections(module):
            layer = getattr(module, name)
            if isinstance(layer, ExpertLinear):
                del module._modules[name]
                module.register_parameter(name, layer.weight)
        if "forward" in vars(module) and projections(module):
            del module.forward


def dequantized_experts(layer: QuantizedExperts) -> ExpertLinear:
    """Return a frozen dense stack with the weights of a coded one, in the dtype it computes in."""
    weight = layer.dequantize()
    laid_out = weight.mT.contiguous() if layer.transposed else weight
    return ExpertLinear(nn.Parameter(laid_out, requires_grad=False), layer.transposed).train(layer.training)


def _routed(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *unused: Any, **none: Any
) -> Tensor:
    """Return the sum over each token's experts, by their weights, of what they make of it, (N, hidden).

    hidden_states (N, hidden), top_k_index and top_k_weights (N, experts of a token): the forward that transformers'
    decorator `use_experts_implementation` gives these modules, over layers instead of parameters.
    """
    assert not unused and not none
    chosen = top_k_index.shape[-1]
    experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
    sizes = RowsPerExpert(experts, self.num_experts)
    first = "gate_up_proj" if self.has_gate else "up_proj"
    inner = _with_bias(self, first, hidden_states[order // chosen], sizes, experts)
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    output = _with_bias(self, "down_proj", inner, sizes, experts)
    if self.has_post_expert_norm:
        output = self.post_expert_norm(output)
    weighted = output * top_k_weights.reshape(-1)[order, None]
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return weighted[back].view(len(hidden_states), chosen, -1).sum(1).to(hidden_states.dtype)


def _with_bias(self: Any, name: str, x: Tensor, sizes: Sequence[int], experts: Tensor) -> Tensor:
    output: Tensor = getattr(self, name)(x, sizes)
    return output + getattr(self, f"{name}_bias")[experts] if self.has_bias else output


def _every_expert(self: Any, hidden_states: Tensor) -> Tensor:
    """Return what each expert makes of its rows: (experts x N, hidden), N for every expert, to the same shape."""
    sizes = [len(hidden_states) // self.num_experts] * self.num_experts
    gate, up = self.gate_up_proj(hidden_states.reshape(-1, self.hidden_size), sizes).chunk(2, dim=-1)
    output: Tensor = self.down_proj(up * self.act_fn(gate), sizes)
    return output
