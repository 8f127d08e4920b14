"""Other engines and what they do with an adapter: the table `engines.yaml`, and what it says of one adapter."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from pathlib import Path

import yaml

from lightning_peft.adapters.base import AdapterConfig
from lightning_peft.adapters.bias import Bias
from lightning_peft.adapters.registry import METHODS

TABLE = Path(__file__).with_name("engines.yaml")
PAIR_FORMATS = ("plain", "gguf_lora")
"""Formats of `export` that hold the adapter alone, as low-rank pairs."""
NEVER_LOW_RANK = ("dora", "hira", "ia3", "miss", "intrinsic", "other_method")
"""Features whose change is no low-rank sum, whatever the file."""
ENDS = ("embed", "lm_head", "wte")
"""Parts of the names of embeddings and heads."""
WHOLE_TENSORS = ("trained_modules", "trained_embeddings", "trained_biases", "adapted_experts")
"""Features that change tensors of the base that no pair of a layer stands for."""
STACK = re.compile(r"(^|\.)experts(\.[a-z]\w*)?$")
"""Ends of the names of stacked experts; one expert's own layer has its number there."""


class Outcome(Enum):
    """Ways in which an engine treats a file."""

    ok = "ok"
    refuses = "refuses"
    wrong = "wrong"


@dataclass(frozen=True)
class Cell:
    """An engine's treatment of one feature."""

    outcome: Outcome
    how: str = ""

    @classmethod
    def of(cls, text: str) -> "Cell":
        outcome, _, how = text.partition(":")
        return cls(Outcome(outcome), how.strip())


@dataclass(frozen=True)
class EngineRow:
    """A row of the table."""

    title: str
    version: str
    seen: str
    """run, or source where only its code was read."""
    reads: tuple[str, ...]
    """Formats of `export`."""
    cells: Mapping[str, Cell]
    """Feature of the run's own folder -> what the engine does with it."""
    kept: Mapping[str, Cell] = field(default_factory=dict)
    """The same for the formats in `reads`, where it is not ok."""
    rank_option: str = ""
    """The engine's option for the largest rank; empty where any goes."""
    rank_default: int = 0
    rank_sizes: tuple[int, ...] = ()
    """Values that the option takes; empty where any goes."""


@dataclass(frozen=True)
class FileVerdict:
    """One engine's treatment of one file."""

    outcome: Outcome
    text: str


@cache
def engines() -> dict[str, EngineRow]:
    """Return the table, by the names that `engine=` and `target_server=` take."""
    return {
        name: EngineRow(
            **{key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
            | {
                "version": str(row["version"]),
                "cells": {feature: Cell.of(text) for feature, text in row["cells"].items()},
                "kept": {feature: Cell.of(text) for feature, text in row.get("kept", {}).items()},
            }
        )
        for name, row in yaml.safe_load(TABLE.read_text(encoding="utf-8")).items()
    }


def check_engines(option: str, names: Iterable[str]) -> None:
    """Raise ValueError for a name that is not in the table."""
    for name in names:
        if name not in engines():
            raise ValueError(f"{option}={name}: no such engine in the table; choose from {', '.join(engines())}")


def features_of(config: AdapterConfig) -> list[str]:
    """Return what decides how engines treat an adapter of this config; the keys of an engine's cells."""
    method = METHODS[config.method]
    if method.trains_all:
        return []
    known = next(iter(engines().values())).cells
    spelling = method.peft
    in_pairs = spelling is not None and spelling.is_low_rank
    found = ["lora" if in_pairs else config.method if config.method in known else "other_method"]
    if spelling is not None and spelling.word_of(config, "use_rslora"):
        found.append("rslora")
    if spelling is not None and spelling.alpha_word is not None:
        alphas = {config.alpha, *config.alpha_pattern.values()} - {None}
        if any(alpha != int(alpha) for alpha in alphas if alpha is not None):
            found.append("fractional_alpha")
    if config.rank_pattern or config.rank_last is not None or config.initialization.spreads_ranks:
        found.append("rank_pattern")
    if config.alpha_pattern:
        found.append("alpha_pattern")
    if config.initialization.rewrites_base:
        found.append("rewritten_base")
    targets = [config.target_modules] if isinstance(config.target_modules, str) else list(config.target_modules)
    if config.layers is not None or covers_some_blocks(targets):
        found.append("some_blocks")
    for feature, words in (("adapted_head", ("lm_head", "embed_out")), ("adapted_embeddings", ("embed_tokens", "wte"))):
        if any(word in target for target in targets for word in words):
            found.append(feature)
    if config.experts not in (None, "none") or any(STACK.search(target) for target in targets):
        found.append("adapted_experts")
    for name in config.trainable_modules:
        found.append("trained_embeddings" if any(end in name for end in ENDS) else "trained_modules")
    if config.trained_biases is not Bias.none:
        found.append("trained_biases")
    return list(dict.fromkeys(found))


def covers_some_blocks(targets: Iterable[str]) -> bool:
    """Return whether targets that name blocks by number leave a kind of layer out of one of them."""
    blocks: dict[str, set[int]] = {}
    for target in targets:
        if number := re.search(r"(?:^|\.)(\d+)\.", target):
            kind = target[: number.start(1)] + target[number.end(1) :]
            blocks.setdefault(kind, set()).add(int(number[1]))
    count = max((max(found) + 1 for found in blocks.values()), default=0)
    return any(len(found) < count for found in blocks.values())


def largest_rank(config: AdapterConfig) -> int:
    """Return the largest rank of a layer in the file that such a run saves."""
    ranks = [config.rank or 0, config.rank_last or 0, *config.rank_pattern.values()]
    growth = config.rank_growth if config.initialization.spreads_ranks else 1.0
    return int(max(ranks) * growth) * (2 if config.initialization.rewrites_base else 1)


def not_low_rank(features: Iterable[str]) -> str | None:
    """Return the first feature that no file of low-rank pairs can hold; None where all can be."""
    return next((feature for feature in features if feature in (*NEVER_LOW_RANK, *WHOLE_TENSORS)), None)


def verdict(engine: EngineRow, features: Sequence[str], rank: int, format: str | None) -> FileVerdict:
    """Return what an engine does with an adapter: with its own folder, or exported in a format.

    `features` are those of the training's config, `rank` is the largest of a layer.
    """
    if format is not None and format not in engine.reads:
        blocking = not_low_rank(features)
        fitting = [other for other in engine.reads if blocking is None or other not in PAIR_FORMATS]
        remedy = f"use format={fitting[0]}" if fitting else "use `lightning-peft merge`"
        return FileVerdict(Outcome.refuses, f"does not read format={format}; {remedy}")
    cells = engine.cells if format is None else engine.kept
    found = [(feature, cells[feature]) for feature in features if feature in cells]
    for outcome in (Outcome.refuses, Outcome.wrong):
        if bad := [(feature, cell) for feature, cell in found if cell.outcome is outcome]:
            says = "would compute it wrongly" if outcome is Outcome.wrong else "refuses it"
            feature, cell = bad[0]
            return FileVerdict(outcome, f"{says} ({spoken(feature)}): {cell.how}")
    needs = [cell.how for _, cell in found if cell.how]
    if engine.rank_option and format in (None, "plain") and rank:
        if engine.rank_sizes and rank > engine.rank_sizes[-1]:
            return FileVerdict(
                Outcome.refuses, f"refuses it: rank {rank} is above its largest, {engine.rank_sizes[-1]}"
            )
        if rank > engine.rank_default:
            size = next((size for size in engine.rank_sizes if size >= rank), rank)
            needs.append(f"needs {engine.rank_option} {size}")
    return FileVerdict(Outcome.ok, "; ".join(["computes it rightly", *needs]))


def spoken(feature: str) -> str:
    """Return a feature in the words of a message."""
    names = {"rslora": "rsLoRA", "dora": "DoRA", "adalora": "AdaLoRA", "vera": "VeRA", "hira": "HiRA", "ia3": "IA3"}
    names["other_method"] = "a method of its own"
    return names.get(feature, feature.replace("_", " "))


def table_of(features: Sequence[str], own_rank: int, format: str, rank: int) -> list[str]:
    """Return a line for each engine: what it does with an export, and with the run's own folder where that differs."""
    lines = []
    for name, engine in engines().items():
        exported = verdict(engine, features, rank, format)
        own = verdict(engine, features, own_rank, None)
        line = f"{name:<10} {exported.text}"
        if exported.outcome is Outcome.ok and own.outcome is not Outcome.ok:
            line += f" [the run's own folder: {own.text}]"
        lines.append(line)
    return lines


def refuse_wrong_engines(names: Sequence[str], features: Sequence[str], rank: int, format: str) -> None:
    """Raise ValueError where an engine of `engine=` would refuse an export, or compute it wrongly."""
    for name in names:
        engine = engines()[name]
        found = verdict(engine, features, rank, format)
        if found.outcome is not Outcome.ok:
            raise ValueError(f"engine={name} format={format}: {engine.title} {found.text}")


def check_target_servers(names: Sequence[str], config: AdapterConfig) -> list[str]:
    """Return a line for each engine that a run is meant for. Raises ValueError for one that could not serve it."""
    check_engines("target_server", names)
    features, lines = features_of(config), []
    if not features:
        return [f"target_server={name}: serves the whole model that method=full writes" for name in names]
    blocking = not_low_rank(features)
    for name in names:
        engine = engines()[name]
        fitting = [format for format in engine.reads if blocking is None or format not in PAIR_FORMATS]
        if not fitting:
            assert blocking is not None
            raise ValueError(
                f"target_server={name}: {engine.title} cannot serve {spoken(blocking)} beside its base "
                f"({engine.cells[blocking].how}), and no export makes it a low-rank pair; train without it, or drop "
                "target_server and merge"
            )
        export = fitting[0]
        exported = verdict(engine, features, largest_rank(config), export)
        if exported.outcome is not Outcome.ok:
            raise ValueError(f"target_server={name}: {engine.title} {exported.text}")
        own = verdict(engine, features, largest_rank(config), None)
        after = "" if own.outcome is Outcome.ok else f" after `export format={export}`, as it {own.text}"
        lines.append(f"target_server={name}: {engine.title} {exported.text}{after}")
    return lines
