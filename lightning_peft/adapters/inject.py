"""Puts adapters into a model and takes them out again."""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_peft.adapters.base import Adapter, AdapterConfig, StepSchedule, Target
from lightning_peft.adapters.bias import layers_with_bias, train_biases, warn_of_rounding
from lightning_peft.adapters.ends import ends, is_tied, untie_where_asked
from lightning_peft.adapters.former_names import with_present_names
from lightning_peft.adapters.layer_names import matches, nearest_names
from lightning_peft.adapters.registry import METHODS
from lightning_peft.adapters.targets import expert_share, find_targets
from lightning_peft.quantization.experts import expert_stacks, open_experts
from lightning_peft.quantization.weights import is_quantized, weight_shape

BLOCK_NUMBER = re.compile(r"\.\d+\.")
SHARED = "adapter_shared"
"""Attribute of the model that holds state shared by its adapters, such as VeRA's pair.

A key `adapter_shared.vera_A` of the state dict is `base_model.vera_A` in a PEFT file.
"""


def inject_adapters(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Freeze `model`, wrap the layers `config` selects, and return their names. The model may be on the meta device.

    Method "full" wraps nothing and leaves every weight trainable. RuntimeError when there are adapters already.
    """
    injection = Injection(model, config)
    injection.finish()
    return [target.name for target in injection.targets]


class Injection:
    """`inject_adapters` for a model whose transformer blocks are filled one after another.

    The checks, and the freezing, come first, when blocks may still be on the meta device. `adapt` follows each block
    once it is filled, in their order, and `finish` the last: random numbers are drawn as for a model filled at once.
    """

    def __init__(self, model: nn.Module, config: AdapterConfig):
        if next(adapters(model), None) is not None:
            raise RuntimeError("this model has adapters already: inject into a fresh one, or merge_adapters first")
        if METHODS[config.method].layers:
            config = with_present_names(model, config)
        self.model, self.config, self.method = model, config, METHODS[config.method]
        self.targets: list[Target] = []
        self.shared: dict[str, nn.Module] = {}
        self.wrapped = 0
        """Targets that are wrapped already."""
        self.trained: dict[str, nn.Module] = {}
        """Modules trained in full that still wait for their weights, by name."""
        self.biased: list[str] = []
        """Layers that still wait for their weights and whose bias trains."""
        self.rounded_biases = 0
        if self.method.trains_all:
            _train_everything(model, config.method)
        if not self.method.layers:
            return
        untie_where_asked(model, config)
        self.targets = find_targets(model, config, tuple(self.method.layers))
        names = {target.name for target in self.targets}
        open_experts(model, [target.name for target in self.targets if target.experts])
        self.trained = _find_trainable(model, config.trainable_modules, names)
        self.biased = layers_with_bias(model, names, config.trained_biases)
        if not self.method.trains_base:
            model.requires_grad_(False)
        if self.method.shared is not None:
            self.shared["shared"] = self.method.shared(config, self.targets, model)
            first = next(model.parameters())
            filled = next((parameter for parameter in model.parameters() if not parameter.is_meta), first)
            setattr(model, SHARED, self.shared["shared"].to(filled.device).train(model.training))

    def adapt(self, block: str) -> None:
        """Wrap the targets up to the last one in the block of that name, and train what trains in it."""
        self._adapt(f"{block}.")

    def finish(self) -> None:
        """Adapt what is left."""
        self._adapt("")
        tie(self.model, self.config.tied)
        warn_of_rounding(self.config.trained_biases, self.rounded_biases)

    def _adapt(self, prefix: str) -> None:
        inside = [index for index, target in enumerate(self.targets, 1) if target.name.startswith(prefix)]
        for target in self.targets[self.wrapped : max(inside, default=0)]:
            base_layer = self.model.get_submodule(target.name)
            layer_class: Any = next(layer for kind, layer in self.method.layers.items() if isinstance(base_layer, kind))
            layer = layer_class(base_layer, target, self.config, **self.shared)
            layer.reset_parameters()
            layer.train(base_layer.training)
            self.model.set_submodule(target.name, layer)
        self.wrapped = max([self.wrapped, *inside])
        ready = [name for name in self.trained if name.startswith(prefix)]
        _train_in_fp32([self.trained.pop(name) for name in ready])
        ready = [name for name in self.biased if name.startswith(prefix)]
        self.biased = [name for name in self.biased if name not in ready]
        wrapped = {name for name, _ in adapters(self.model)}
        places = [f"{name}.base_layer" if name in wrapped else name for name in ready]
        self.rounded_biases += train_biases(self.model, places)


def adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """Return the adapters of the model with the names their base layers had."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Adapter))


def tie(model: nn.Module, names: tuple[str, ...]) -> None:
    """Give all adapters the first one's parameters of these names."""
    layers = [layer for _, layer in adapters(model)]
    for name in names:
        for layer in layers[1:]:
            setattr(layer, name, getattr(layers[0], name))


def trained_in_full(model: nn.Module) -> set[str]:
    """Return the names of trained parameters that belong to no adapter: those of modules trained beside adapters."""
    inside = tuple(f"{name}." for name, _ in adapters(model)) + (f"{SHARED}.",)
    return {name for name, p in model.named_parameters() if p.requires_grad and not name.startswith(inside)}


def regularization(model: nn.Module) -> Tensor | None:
    """Return the extra loss of the adapters: the mean over the layers that have one, plus that of their shared state.

    The loss is None where neither has one.
    """
    losses = [loss for _, adapter in adapters(model) if (loss := adapter.regularization()) is not None]
    total = torch.stack(losses).mean() if losses else None
    own = getattr(getattr(model, SHARED, None), "regularization", lambda: None)()
    return own if total is None else total if own is None else total + own


def step_schedule(model: nn.Module, config: AdapterConfig, total_steps: int) -> StepSchedule | None:
    """Return the schedule to call after every optimiser step; None for methods that change nothing between steps."""
    build = METHODS[config.method].schedule
    return None if build is None else build(dict(adapters(model)), config, total_steps)


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Make the model its base inside. Modules trained in full, and trained biases, keep their values."""
    before = [(adapter, adapter.enabled) for _, adapter in adapters(model)]
    for adapter, _ in before:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter, enabled in before:
            adapter.enabled = enabled


def trainable_parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Return (trainable, all) parameters. A quantised layer counts its weights, not its codes; a tied weight once."""
    trainable = total = 0
    seen: set[int] = set()
    for module in model.modules():
        if is_quantized(module):
            total += math.prod(weight_shape(module))
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or (is_quantized(module) and name != "bias"):
                continue
            seen.add(id(parameter))
            total += parameter.numel()
            trainable += parameter.numel() * parameter.requires_grad
    return trainable, total


def describe_targets(targets: list[Target], model: nn.Module) -> Table:
    """Make a table of the wrapped layers of a model, a row for all that differ by their block alone.

    A row has their number, shape, rank, alpha and the trainable parameters of all of them; totals stand below.
    """
    found = dict(adapters(model))
    trainable, total = trainable_parameter_counts(model)
    table = Table(
        "module", "layers", "shape", "rank", "alpha", "parameters",
        caption=f"{trainable:,} of {total:,} parameters train",
    )  # fmt: skip
    alike: dict[tuple[str, ...], list[int]] = {}
    for target in targets:
        kind = (
            BLOCK_NUMBER.sub(".*.", target.name),
            f"{f'{target.experts} x ' if target.experts else ''}{target.out_features} x {target.in_features}",
            *("-" if value is None else f"{value:g}" for value in (target.rank, target.alpha)),
        )
        trained = sum(p.numel() for p in found[target.name].parameters() if p.requires_grad)
        alike.setdefault(kind, []).append(trained)
    for (name, *figures), parameters in alike.items():
        table.add_row(name, f"{len(parameters):,}", *figures, f"{sum(parameters):,}")
    stacks = expert_stacks(model)
    for words, part in (
        ("experts, adapted", {name: stack for name, stack in stacks.items() if name in found}),
        ("experts, as they are", {name: stack for name, stack in stacks.items() if name not in found}),
    ):
        if part:
            factors = [p for name in part if name in found for p in found[name].parameters()]
            trained = sum(p.numel() for p in factors if p.requires_grad)
            table.add_section()
            share = f"{expert_share(model, part):.1%} of weights"
            table.add_row(words, f"{len(part):,}", share, "-", "-", f"{trained:,}")
    return table


def _train_everything(model: nn.Module, method: str) -> None:
    for name, module in model.named_modules():
        if is_quantized(module):
            raise ValueError(f"method={method} cannot train the quantised weight of {name}: use quantization=none")
    model.requires_grad_(True)


def _find_trainable(model: nn.Module, patterns: list[str], adapted: set[str]) -> dict[str, nn.Module]:
    """Return the modules to be trained in full beside the adapters, each with parameters of its own, by name."""
    names = [name for name, module in model.named_modules() if name and next(module.parameters(), None) is not None]
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        hits = [name for name in names if matches(pattern, name)]
        if not hits:
            raise ValueError(
                f"adapter.trainable_modules: {pattern} matches no module; nearest: {nearest_names([pattern], names)}"
            )
        found.update({name: model.get_submodule(name) for name in hits})
    for name, module in found.items():
        if any(target == name or target.startswith(f"{name}.") for target in adapted):
            raise ValueError(
                f"adapter.trainable_modules: {name} is among adapter.target_modules too: name it in one of them"
            )
        if any(is_quantized(part) for part in module.modules()):
            raise ValueError(f"adapter.trainable_modules: {name} is quantised and cannot be trained in full")
    if is_tied(model):
        inside = [any(end in module.modules() for module in found.values()) for end in ends(model)]
        if any(inside) and not all(inside):
            both = [name for name, module in model.named_modules() if module in ends(model)]
            raise ValueError(
                f"adapter.trainable_modules={patterns}: this model ties {both[0]} and {both[1]}; name both or neither"
            )
    parts = {part: path for name, module in found.items() for path, part in module.named_modules(prefix=name)}
    return {path: part for part, path in parts.items() if _own(part)}


def _train_in_fp32(modules: list[nn.Module]) -> None:
    """Make every weight of these modules trainable and fp32, while activations keep the dtype the model computes in."""
    parts = {module: _own(module)[0].dtype for module in modules}
    for part, compute_dtype in parts.items():
        for parameter in _own(part):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        if compute_dtype != torch.float32:
            part.register_forward_pre_hook(_to_fp32, with_kwargs=True)
            part.register_forward_hook(_To(compute_dtype))


@contextmanager
def telling_own_tokens(model: nn.Module, own: Callable[[], Tensor]) -> Iterator[None]:
    """Tell the adapters' shared state, where it asks, which tokens are a sample's own, (B, T) bool."""
    shared: Any = getattr(model, SHARED, None)
    if not hasattr(shared, "own_tokens"):
        yield
        return
    shared.own_tokens = own()
    try:
        yield
    finally:
        shared.own_tokens = None


def computes_in(module: nn.Module) -> torch.dtype | None:
    """Return the dtype of the activations around a layer that trains in fp32 and has no hooks but its casts."""
    before, after = list(module._forward_pre_hooks.values()), list(module._forward_hooks.values())
    if before == [_to_fp32] and len(after) == 1 and isinstance(after[0], _To):
        return after[0].dtype
    return None


def _own(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))


def _cast(values: Any, dtype: torch.dtype) -> Any:
    """Cast the floating tensors of `values`, also in tuples and dictionaries, to `dtype`; return the rest as it is."""
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, values)


def _to_fp32(module: nn.Module, inputs: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return _cast(inputs, torch.float32), _cast(keywords, torch.float32)


class _To:
    """Forward hook that casts what a module returns: a router returns a tuple."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        return _cast(output, self.dtype)
