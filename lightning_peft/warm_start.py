"""Words of a run that continues an adapter folder: its method, sizes, layers and base, as the folder says them."""

import logging
from collections.abc import Iterator
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import Any

from lightning_peft.adapters.base import AdapterConfig
from lightning_peft.adapters.registry import METHODS
from lightning_peft.checkpoint.lineage import EXPORTED_BY, Lineage, read_lineage
from lightning_peft.checkpoint.peft_format import adapter_config_from_peft
from lightning_peft.config import train_config
from lightning_peft.inference.load import adapter_folder, base_named_by

logger = logging.getLogger(__name__)

OF_THE_RUN = ("method", "init_from", "init")
"""Options of an adapter that are not taken from the folder: they say how a run starts."""


def words_of_folder(path: str, given: set[str]) -> list[tuple[str, Any]]:
    """Return options by key, in an order in which they can be written on the command line, that fit an adapter folder.

    `given` are the keys that the user has typed, which stay as typed: with a method of the user's own nothing about the
    adapter is taken over. Raises ValueError for a path that is no adapter folder, or an unreadable one.
    """
    folder = adapter_folder(path, "adapter.init_from")
    lineage = read_lineage(folder)
    base = [] if given & {"model", "model.path", "model.name"} else list(_base(folder, lineage))
    adapter = [] if given & {"method", "adapter"} else list(_adapter(folder, lineage))
    typed = given | ({"adapter.rank"} if "rank" in given else set())
    typed |= {"adapter.target_modules"} if "target_modules" in given else set()
    words = [(key, value) for key, value in [*base, *adapter] if key not in typed]
    if words:
        shown = [f"{key}={_short(value)}" for key, value in words if "pattern" not in key]
        logger.info("adapter.init_from=%s: as saved there: %s", path, " ".join(shown))
    return words


def _base(folder: Path, lineage: Lineage | None) -> Iterator[tuple[str, Any]]:
    model = lineage.config.get("model") if lineage is not None else None
    if model:
        yield "model", model["name"]
        for option in ("path", "revision", "new_tokens", "label"):
            if model.get(option):
                yield f"model.{option}", model[option]
        for key, value in (model.get("rope_scaling") or {}).items():
            if value is not None:
                yield f"model.rope_scaling.{key}", value
        return
    if (named := base_named_by(folder)) is not None:
        yield "model", "hf"
        yield "model.path", named.path
        if named.revision is not None:
            yield "model.revision", named.revision


def _adapter(folder: Path, lineage: Lineage | None) -> Iterator[tuple[str, Any]]:
    config = adapter_config_from_peft(folder)
    options, method = _changed(config), config.method
    # An export has put scaling and ranks of its own into the factors: its file alone says how they are read.
    saved = lineage.config if lineage is not None and lineage.created_by != EXPORTED_BY else {}
    if saved.get("adapter") and is_as_trained(train_config(saved).adapter, config):
        # The user's own words say the same: a preset of layers instead of all their names, and the preset of options.
        options, method = _changed(train_config(saved).adapter), saved.get("method") or method
    yield "method", method
    for option, value in options.items():
        if option not in OF_THE_RUN:
            yield f"adapter.{option}", value


def is_as_trained(trained: AdapterConfig, in_file: AdapterConfig) -> bool:
    """Return whether a run's own options still describe its file: no start rewrote the base, no rank was changed."""
    ranks = {in_file.rank, *in_file.rank_pattern.values()}
    return (
        trained.method == in_file.method
        and trained.initialization.is_neutral
        and (ranks == {trained.rank} or bool(trained.rank_pattern or trained.rank_last))
    )


def _changed(config: AdapterConfig) -> dict[str, Any]:
    """Return the options that differ from those the method has by itself, and its sizes in any case."""
    changed = {}
    for option in fields(METHODS[config.method].config):
        value = getattr(config, option.name)
        default = option.default if option.default_factory is MISSING else option.default_factory()
        if value != default or option.name in ("rank", "alpha"):
            changed[option.name] = value.name if isinstance(value, Enum) else value
    return changed


def _short(value: Any) -> str:
    return f"[{value[0]}, ... {len(value)} in all]" if isinstance(value, list) and len(value) > 3 else str(value)
