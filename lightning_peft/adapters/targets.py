"""Which layers get an adapter, and of what size. Needs shapes only: a model on the meta device will do."""

import difflib
import logging
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lightning_peft.adapters.base import AdapterConfig, Target
from lightning_peft.quantization.weights import is_linear, linear_shape, stacked_experts

logger = logging.getLogger(__name__)

FUSED_QUERY_KEY_VALUE = ["query_key_value", "qkv_proj", "qkv", "c_attn", "Wqkv"]
FEED_FORWARD_OUT = ["down_proj", "fc2", "fc_out", "mlp.c_proj", "dense_4h_to_h", "w2"]

PRESETS: dict[str, list[str]] = {
    "all_linear": ["*"],
    "attention": ["re:.*(?i:attn|attention).*"],
    "mlp": ["re:(?!.*(attn|attention)).*(mlp|ffn|feed_forward).*", "fc1", "fc2"],
    "query_value": ["q_proj", "v_proj", "query", "value", *FUSED_QUERY_KEY_VALUE],
    "query_key_value": ["q_proj", "k_proj", "v_proj", "query", "key", "value", *FUSED_QUERY_KEY_VALUE],
    "key_value_down": ["k_proj", "v_proj", "key", "value", *FUSED_QUERY_KEY_VALUE, *FEED_FORWARD_OUT],
}
"""Patterns per preset, over linear layers of the transformer blocks only: never embeddings, never the output head.

Architectures differ in names, so a preset lists them all and asks that one matches: llama's q_proj, GPT-2's c_attn,
GPT-NeoX's query_key_value, phi-3's qkv_proj.
"""


def matches(pattern: str, name: str) -> bool:
    """Return whether a dotted module name fits: an exact name or its end after a dot, a glob, or `re:` and a regex."""
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    if any(character in pattern for character in "*?["):
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
    return name == pattern or name.endswith(f".{pattern}")


def block_depth(name: str) -> int | None:
    """Return the index of the transformer block a module lies in: the first number in its dotted name."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(found.group(1)) if found else None


def parse_layers(layers: str) -> Callable[[int], bool]:
    """Test for "0-3,7,10-": is this block among them."""
    ranges: list[tuple[int, float]] = []
    for part in layers.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(-\s*(\d*))?\s*", part)
        if found is None:
            raise ValueError(f"adapter.layers={layers!r}: write block numbers and ranges, as in 0-3,7,10-")
        first = int(found.group(1))
        last = first if found.group(2) is None else int(found.group(3)) if found.group(3) else float("inf")
        if last < first:
            raise ValueError(f"adapter.layers={layers!r}: {part.strip()} ends before it starts")
        ranges.append((first, last))
    return lambda depth: any(first <= depth <= last for first, last in ranges)


def find_targets(model: nn.Module, config: AdapterConfig, layer_types: tuple[type[nn.Module], ...]) -> list[Target]:
    """Return the layers of `model` that `config` selects, in the model's order, with rank and alpha.

    Only layers of `layer_types` are candidates.

    ValueError when a pattern or the whole selection matches nothing, when a tied embedding or head is selected, or
    when a rank exceeds its layer and the initialisation cannot have that.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, layer_types)}
    candidates = {n: m for n, m in found.items() if not isinstance(m, nn.Linear) or is_linear(m)}
    if other := sorted({type(module).__name__ for name, module in found.items() if name not in candidates}):
        logger.info("not adapted, as they compute something else than a product: %s", ", ".join(other))
    selected = _select(model, config, candidates)
    _refuse_tied(model, selected, "adapter.target_modules")
    depths = [depth for name in candidates if (depth := block_depth(name)) is not None]
    last_depth = max(depths, default=0)
    targets = [_target(name, candidates[name], config, last_depth) for name in selected]
    _check_patterns_used("adapter.rank_pattern", config.rank_pattern, selected)
    _check_patterns_used("adapter.alpha_pattern", config.alpha_pattern, selected)
    _check_ranks(targets, config)
    share = expert_share(model)
    if share > 0:
        logger.warning(
            "%.1f %% of the linear weights are in 3-D expert parameters, which no adapter covers (%s)",
            100 * share,
            ", ".join(sorted({name.rpartition(".")[2] for name in expert_parameters(model)})),
        )
    return targets


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return stacked weights of mixture-of-experts layers, (experts, rows, columns), by name."""
    return {
        f"{prefix}.{name}": parameter
        for prefix, module in model.named_modules()
        for name, parameter in stacked_experts(prefix, module)
    }


def expert_share(model: nn.Module) -> float:
    """Return the share of the blocks' linear weights held in stacked expert parameters."""
    experts = sum(parameter.numel() for parameter in expert_parameters(model).values())
    if experts == 0:
        return 0.0
    linear = 0
    for name, module in model.named_modules():
        if block_depth(name) is not None and isinstance(module, nn.Linear):
            rows, columns = linear_shape(module)
            linear += rows * columns
    return experts / (experts + linear)


def is_tied(model: nn.Module) -> bool:
    """Return whether the output head shares its weight with the input embedding."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return False
    embedding, head = ends(model)
    if embedding is None or head is None:
        return False
    # A model on the meta device may not be tied yet.
    return embedding.weight is head.weight or head.weight.is_meta


def text_tower(model: nn.Module) -> str | None:
    """Name of the part of a multimodal model that reads text; None for a model of text alone."""
    config = getattr(model, "config", None)
    kinds = ("vision_config", "audio_config", "vit_config")
    if not any(getattr(config, kind, None) is not None for kind in kinds):
        return None
    embedding, _ = ends(model)
    names = [name for name, module in model.named_modules() if module is embedding]
    return names[0].rpartition(".")[0] or None if names else None


def ends(model: nn.Module) -> tuple[Any, Any]:
    """Return the input embedding and output head; None where a model has none."""
    getters: list[Any] = [getattr(model, f"get_{end}_embeddings", lambda: None) for end in ("input", "output")]
    return getters[0](), getters[1]()


def names_an_end(model: nn.Module, config: AdapterConfig) -> bool:
    """Whether the names given to adapt or to train are those of an embedding or head that share one weight."""
    if not is_tied(model):
        return False
    given = config.target_modules if isinstance(config.target_modules, list) else [config.target_modules]
    patterns = [*map(str, given), *config.trainable_modules]
    names = [name for name, module in model.named_modules() if module in ends(model)]
    return any(matches(pattern, name) for pattern in patterns if pattern not in PRESETS for name in names)


def untie(model: Any) -> None:
    """Give the output head a copy of the weight it shares with the embedding."""
    embedding, head = ends(model)
    head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    names = {f"{name}.weight" for name, module in model.named_modules() if module is head}
    model.all_tied_weights_keys = {k: v for k, v in model.all_tied_weights_keys.items() if k not in names}
    logger.info("the output head no longer shares the embedding's weight: the adapter changes one of them")


def nearest_names(patterns: Iterable[str], names: Iterable[str]) -> str:
    """Return the last parts of `names` most like the patterns, for an error message."""
    leaves = sorted({name.rpartition(".")[2] for name in names})
    close = [leaf for pattern in patterns for leaf in difflib.get_close_matches(pattern, leaves, n=3, cutoff=0.4)]
    return ", ".join(dict.fromkeys(close)) or ", ".join(leaves[:12])


def _select(model: nn.Module, config: AdapterConfig, candidates: dict[str, nn.Module]) -> list[str]:
    """Return the names of the selected candidates."""
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
    found = {entry: _matching(entry, list(candidates), inner) for entry in entries}
    counts = ", ".join(f"{entry}: {len(names)}" for entry, names in found.items())
    unused = [entry for entry, names in found.items() if not names]
    if unused:
        message = f"adapter.target_modules={given!r} matches no linear layer ({counts})"
        experts = list(expert_parameters(model))
        if apart := [entry for entry in unused if re.search(r"\.experts\.\d+\.", entry)]:
            raise ValueError(
                f"adapter.target_modules: {len(apart)} layers such as {apart[0]} are single experts, as transformers 4 "
                "had them; this model stacks its experts in one parameter, which no adapter covers. An adapter of the "
                "other layers alone can be used"
            )
        if any(_matching(entry, experts, experts) for entry in unused):
            message += "; the name belongs to 3-D expert parameters, which no adapter covers"
        raise ValueError(f"{message}; nearest: {nearest_names(unused, candidates)}; presets: {', '.join(PRESETS)}")
    _check_patterns_used("adapter.exclude_modules", config.exclude_modules, candidates)
    chosen = set().union(*found.values())
    chosen -= {name for name in chosen if any(matches(pattern, name) for pattern in config.exclude_modules)}
    if config.layers is not None:
        wanted = parse_layers(config.layers)
        chosen = {name for name in chosen if (depth := block_depth(name)) is not None and wanted(depth)}
    if not chosen:
        depths = [depth for name in inner if (depth := block_depth(name)) is not None]
        raise ValueError(
            f"adapter.layers={config.layers!r} with exclude_modules={list(config.exclude_modules)} leaves none of the "
            f"layers matched ({counts}); this model's blocks are 0-{max(depths, default=0)}"
        )
    return [name for name in candidates if name in chosen]


def _matching(entry: str, names: list[str], inner: list[str]) -> set[str]:
    if entry in PRESETS:
        return {name for name in inner if any(matches(pattern, name) for pattern in PRESETS[entry])}
    return {name for name in names if matches(entry, name)}


def _refuse_tied(model: nn.Module, selected: Iterable[str], option: str) -> None:
    if not is_tied(model):
        return
    for name in selected:
        if model.get_submodule(name) in ends(model):
            raise ValueError(
                f"{option}: {name} shares its weight with the model's other embedding (tie_word_embeddings), so "
                "adapting it would untie them: exclude it, or train both in full with adapter.trainable_modules"
            )


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
