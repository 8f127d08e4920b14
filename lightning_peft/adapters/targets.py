"""The layers that get an adapter, and its size. Shapes are enough: a model on the meta device will do."""

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import nn

from lightning_peft.adapters.base import Adapter, AdapterConfig, Target
from lightning_peft.adapters.ends import ends, refuse_tied, text_tower
from lightning_peft.adapters.layer_names import PRESETS, block_depth, form_of_list, matches, nearest_names, parse_layers
from lightning_peft.quantization.experts import ExpertLinear, QuantizedExperts, Stack, expert_stacks
from lightning_peft.quantization.linear import CodedWeight
from lightning_peft.quantization.weights import is_linear, linear_shape

logger = logging.getLogger(__name__)

LISTED = 12
"""Most patterns that an error repeats."""


def find_targets(model: nn.Module, config: AdapterConfig, layer_types: tuple[type[nn.Module], ...]) -> list[Target]:
    """Return the layers of `model` that `config` selects, in the model's order, with rank and alpha.

    Only layers of `layer_types` are candidates, and stacks of experts where those include `ExpertLinear`.

    ValueError when a pattern or the whole selection matches nothing, when a tied embedding or head is selected, when
    a rank exceeds its layer and the initialisation cannot have that, or when experts are asked for in vain.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, layer_types)}
    layers = {name: module for name, module in found.items() if not isinstance(module, ExpertLinear | QuantizedExperts)}
    candidates = {n: m for n, m in layers.items() if not isinstance(m, nn.Linear) or is_linear(m)}
    if other := sorted({type(module).__name__ for name, module in layers.items() if name not in candidates}):
        logger.info("not adapted, as they compute something else than a product: %s", ", ".join(other))
    stacks = expert_stacks(model)
    adaptable = {name: stack for name, stack in stacks.items() if stack.opens and ExpertLinear in layer_types}
    _check_experts(config, stacks, adaptable)
    selected = _select(model, config, candidates, adaptable)
    refuse_tied(model, [name for name in selected if name in candidates], "adapter.target_modules")
    depths = [depth for name in [*candidates, *stacks] if (depth := block_depth(name)) is not None]
    last_depth = max(depths, default=0)
    targets = [
        _expert_target(name, adaptable[name], model, config)
        if name in adaptable
        else _target(name, candidates[name], config, last_depth)
        for name in selected
    ]
    _check_patterns_used("adapter.rank_pattern", config.rank_pattern, selected)
    _check_patterns_used("adapter.alpha_pattern", config.alpha_pattern, selected)
    _check_ranks(targets, config)
    if getattr(config, "experts_share_A", False) and not any(target.experts for target in targets):
        raise ValueError("adapter.experts_share_A=true: no expert is adapted; give adapter.experts=auto or a rank")
    _tell_of_experts(model, config, stacks, adaptable, targets)
    return targets


def expert_share(model: nn.Module, stacks: Mapping[str, Stack] | None = None) -> float:
    """Return the share of the blocks' linear weights held in stacks of experts, or in `stacks` of them."""
    every = expert_stacks(model)
    if not every:
        return 0.0
    total = sum(stack.weights for stack in every.values())
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Adapter))
    for name, module in model.named_modules():
        is_base = not name.startswith(inside) or name.endswith(".base_layer")
        if is_base and block_depth(name) is not None and _is_linear_weight(module):
            total += math.prod(linear_shape(module))
    return sum(stack.weights for stack in (every if stacks is None else stacks).values()) / total


def _is_linear_weight(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or isinstance(module, CodedWeight) and len(module.shape) == 2


def experts_of_a_token(model: nn.Module) -> int:
    """Return how many experts a token is sent to, by the model's configuration; 1 where it does not say."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
    return next((value for name in names if isinstance(value := getattr(text, name, None), int) and value), 1)


def expert_rank(config: AdapterConfig, model: nn.Module) -> int | None:
    """Return the rank `adapter.experts` asks for; None where it asks for none.

    `auto` is the rank of the other layers divided by the experts of a token, so that as many adapter weights act on a
    token in a mixture as in a dense layer (Schulman et al. 2025, LoRA Without Regret).
    """
    if config.experts in (None, "none"):
        return None
    if config.experts == "auto":
        assert config.rank is not None, "methods with a form for experts have a rank"
        return max(1, config.rank // experts_of_a_token(model))
    return int(config.experts)


def _check_experts(config: AdapterConfig, stacks: Mapping[str, Stack], adaptable: Mapping[str, Stack]) -> None:
    if config.experts in (None, "none") or adaptable:
        return
    asked = f"adapter.experts={config.experts}"
    if not stacks:
        raise ValueError(f"{asked}: this model has no experts stacked in 3-D parameters; use adapter.experts=none")
    if any(stack.opens for stack in stacks.values()):
        raise ValueError(
            f"{asked}: method {config.method} has no form for stacked experts; use method=lora, rslora or dora, "
            "or adapter.experts=none"
        )
    raise ValueError(
        f"{asked}: {next(iter(stacks))} is multiplied by code of its own, which no adapter covers; "
        "use adapter.experts=none"
    )


def _expert_target(name: str, stack: Stack, model: nn.Module, config: AdapterConfig) -> Target:
    rank = expert_rank(config, model) or config.rank
    assert rank is not None
    for pattern, value in config.rank_pattern.items():
        rank = value if matches(pattern, name) else rank
    alpha = 2.0 * rank if config.alpha is None else config.alpha
    for pattern, number in config.alpha_pattern.items():
        alpha = number if matches(pattern, name) else alpha
    return Target(name, stack.out_features, stack.in_features, rank, alpha, block_depth(name), stack.experts)


def _tell_of_experts(
    model: nn.Module,
    config: AdapterConfig,
    stacks: Mapping[str, Stack],
    adaptable: Mapping[str, Stack],
    targets: Sequence[Target],
) -> None:
    """Say by how much experts grow the adapter, or would, and which share of the weights is left as it is."""
    taken = [target for target in targets if target.experts]
    size = partial(_size, shares_A=getattr(config, "experts_share_A", False))
    if taken:
        logger.info(
            "%d stacks of experts are adapted at rank %s: %s of the adapter's %s parameters",
            len(taken), ", ".join(sorted({str(t.rank) for t in taken})), f"{size(taken):,}", f"{size(targets):,}",
        )  # fmt: skip
    left = {name: stack for name, stack in stacks.items() if all(name != target.name for target in taken)}
    if not left:
        return
    told = f"{100 * expert_share(model, left):.1f} % of the linear weights are in stacked experts and stay as they are"
    open_to_auto = [name for name in left if name in adaptable]
    if taken or not open_to_auto:
        logger.warning("%s (%s)", told, ", ".join(sorted({name.rpartition(".")[2] for name in left})))
        return
    asked = replace(config, experts="auto")
    more = [_expert_target(name, adaptable[name], model, asked) for name in open_to_auto]
    logger.warning(
        "%s; adapter.experts=auto would adapt them at rank %s, and the adapter would grow from %s to %s parameters",
        told, more[0].rank, f"{size(targets):,}", f"{size([*targets, *more]):,}",
    )  # fmt: skip


def _size(targets: Iterable[Target], shares_A: bool) -> int:
    """Return the numbers in the factors of low-rank adapters around these layers."""
    return sum(
        (t.rank or 0) * (t.out_features * (t.experts or 1) + t.in_features * (1 if shares_A else t.experts or 1))
        for t in targets
    )


def _select(
    model: nn.Module, config: AdapterConfig, candidates: Mapping[str, nn.Module], stacks: Iterable[str]
) -> list[str]:
    """Return the names of the selected candidates and stacks of experts, in the model's order.

    A pattern that names stacks alone selects them; `adapter.experts` selects all where no pattern does.
    """
    given = config.target_modules
    if given is None or len(given) == 0:
        raise ValueError(f"adapter.target_modules={given}: method {config.method!r} needs layers, such as all_linear")
    entries: list[str] = [given] if isinstance(given, str) else [str(entry) for entry in given]
    outside = ends(model)
    inner = [
        name for name, module in candidates.items() if not isinstance(module, nn.Embedding) and module not in outside
    ]
    if (tower := text_tower(model)) is not None:
        inner = [name for name in inner if name.startswith(f"{tower}.")]
    # A model with no numbered blocks (a toy) counts as one block.
    inner = [name for name in inner if block_depth(name) is not None] or inner
    inner_stacks = [name for name in stacks if tower is None or name.startswith(f"{tower}.")]
    found = {entry: _matching(entry, list(candidates), inner) for entry in entries}
    named = {entry: _matching(entry, inner_stacks, []) for entry in entries if not found[entry]}
    found |= {entry: names for entry, names in named.items() if names}
    if config.experts not in (None, "none") and not any(named.values()):
        found["experts"] = set(inner_stacks)
    counts = ", ".join(f"{entry}: {len(names)}" for entry, names in found.items())
    unused = [entry for entry, names in found.items() if not names]
    if unused:
        message = f"adapter.target_modules={given!r} matches no linear layer ({counts})"
        if len(entries) > LISTED:  # a folder of HF PEFT gives every layer's full name
            told = f"{len(unused)} of {len(entries)} names match no linear layer, such as {unused[0]}"
            message = f"adapter.target_modules: {told}"
        if apart := [entry for entry in unused if re.search(r"\.experts\.\d+\.", entry)]:
            raise ValueError(
                f"adapter.target_modules: {len(apart)} layers such as {apart[0]} are single experts, as transformers 4 "
                "had them; this model stacks its experts in one parameter. An adapter of the other layers alone can be "
                "used"
            )
        kinds = {name: type(module).__name__ for name, module in model.named_modules()}
        if others := [entry for entry in unused if entry in kinds]:
            raise ValueError(
                f"adapter.target_modules: {len(others)} names such as {others[0]} ({kinds[others[0]]}) are no linear "
                "layers, which get no adapter here. An adapter of the other layers alone can be used"
            )
        if any(_matching(entry, list(expert_stacks(model)), []) for entry in unused):
            message += f"; the name belongs to stacked experts, which method {config.method} does not adapt here"
        message += form_of_list(unused[0])
        raise ValueError(f"{message}; nearest: {nearest_names(unused, candidates)}; presets: {', '.join(PRESETS)}")
    everything = [*candidates, *stacks]
    _check_patterns_used("adapter.exclude_modules", config.exclude_modules, everything)
    chosen = set().union(*found.values())
    chosen -= {name for name in chosen if any(matches(pattern, name) for pattern in config.exclude_modules)}
    depths = [depth for name in inner if (depth := block_depth(name)) is not None]
    if config.layers is not None:
        wanted = parse_layers(config.layers, 1 + max(depths) if depths else None)
        chosen = {name for name in chosen if (depth := block_depth(name)) is not None and wanted(depth)}
    if not chosen:
        raise ValueError(
            f"adapter.layers={config.layers!r} with exclude_modules={list(config.exclude_modules)} leaves none of the "
            f"layers matched ({counts}); this model's blocks are 0-{max(depths, default=0)}"
        )
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    # A stack that is still a parameter stands where its module does.
    place = {name: order.get(name, order.get(name.rpartition(".")[0], 0)) for name in everything}
    return sorted((name for name in everything if name in chosen), key=lambda name: place[name])


def _matching(entry: str, names: list[str], inner: list[str]) -> set[str]:
    if entry in PRESETS:
        return {name for name in inner if any(matches(pattern, name) for pattern in PRESETS[entry])}
    return {name for name in names if matches(entry, name)}


def _check_patterns_used(option: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    unused = [pattern for pattern in patterns if not any(matches(pattern, name) for name in names)]
    if unused:
        raise ValueError(f"{option}: {', '.join(unused)} matches no layer; nearest: {nearest_names(unused, names)}")


def _target(name: str, module: nn.Module, config: AdapterConfig, last_depth: int) -> Target:
    if isinstance(module, nn.Embedding):
        out_features, in_features = module.embedding_dim, module.num_embeddings
    else:
        out_features, in_features = linear_shape(module)
    depth = block_depth(name)
    rank, alpha = config.rank, None
    if rank is not None:
        if config.rank_last is not None and depth is not None and last_depth > 0:
            rank = round(rank + (config.rank_last - rank) * depth / last_depth)
        for pattern, value in config.rank_pattern.items():
            rank = value if matches(pattern, name) else rank
        alpha = 2.0 * rank if config.alpha is None else config.alpha
        for pattern, number in config.alpha_pattern.items():
            alpha = number if matches(pattern, name) else alpha
    return Target(name, out_features, in_features, rank, alpha, depth)


def _check_ranks(targets: list[Target], config: AdapterConfig) -> None:
    above = [t for t in targets if t.rank is not None and t.rank > min(t.out_features, t.in_features)]
    if not above:
        return
    first = above[0]
    told = (
        f"rank {first.rank} is above the smaller side of {first.name} ({first.out_features} x {first.in_features})"
        f" and of {len(above) - 1} more layers"
    )
    if config.rank_within_layer:
        raise ValueError(f"adapter.rank={config.rank}: {told}; this method or init needs a rank no layer is below")
    if config.rank_costs_parameters:
        logger.warning("%s: it works, at more parameters than the layer's own", told)
