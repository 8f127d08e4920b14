"""Callbacks and loggers of one's own: what the `_target_` nodes of a config name, checked and made."""

import inspect
import re
import traceback
from collections.abc import Mapping
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_peft.config import TrainConfig
from lightning_peft.tracking.loggers import RunLogger


def check_nodes(config: TrainConfig) -> None:
    """Raise ValueError for a callback or logger whose `_target_` is missing, is none, or takes other arguments.

    Only its module is imported.
    """
    for group, nodes, kind in (("callbacks", config.callbacks, Callback), ("logger", config.logger, Logger)):
        for name, node in nodes.items():
            key = f"{group}.{name}"
            if not isinstance(node, Mapping) or "_target_" not in node:
                own = f"; a logger's own keys are as in logger.wandb.{name}" if group == "logger" else ""
                raise ValueError(f"{key}: has no {key}._target_, the Lightning {kind.__name__.lower()} to be made{own}")
            try:
                target = get_object(node["_target_"])
                arguments = {str(k): value for k, value in node.items() if not re.fullmatch("_[a-z]+_", str(k))}
                if "_args_" not in node:
                    inspect.signature(target).bind(**arguments)
            except (ImportError, ValueError, TypeError) as error:
                raise ValueError(f"{key}._target_={node['_target_']}: {reason(error)}") from error
            if isinstance(target, type) and not issubclass(target, kind):
                raise ValueError(f"{key}._target_={node['_target_']}: no Lightning {kind.__name__.lower()}")
            if isinstance(target, type) and issubclass(target, RunLogger):
                target.check_installed()
                target.check_arguments(key, arguments)


def made(group: str, nodes: Mapping[str, Any], kind: type) -> list[Any]:
    """Return the callbacks or loggers that the nodes describe. Raises ValueError for one that cannot be made."""
    parts = []
    for name, node in nodes.items():
        try:
            parts.append(instantiate(node))
        except InstantiationException as error:
            raise ValueError(f"{group}.{name}: {reason(error)}") from error
        if not isinstance(parts[-1], kind):
            raise ValueError(f"{group}.{name}: {node['_target_']} gives no Lightning {kind.__name__.lower()}")
    return parts


def refusal(error: Exception, callbacks: Mapping[str, Any]) -> str | None:
    """Return in one line what Lightning refuses of the user's options while a run is on; None for any other error.

    It refuses combinations of its arguments, and its own callbacks, of the config's nodes `callbacks`, what they ask
    for. An error out of a callback of one's own code is a defect of that.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not frames or frames[-1].f_globals.get("__name__", "").partition(".")[0] not in ("lightning", "torch"):
        return None
    targets = {name: get_object(node["_target_"]) for name, node in callbacks.items()}
    for frame in reversed(frames):
        owner = frame.f_locals.get("self")
        name = next((name for name, target in targets.items() if type(owner) is target), None)
        if name is not None and type(owner).__module__.startswith("lightning."):
            return f"callbacks.{name}: {reason(error)}"
    return f"trainer: {reason(error)}" if isinstance(error, MisconfigurationException) else None


def reason(error: BaseException) -> str:
    """Return what a library said first, without Hydra's words around it."""
    while isinstance(error, InstantiationException | ImportError) and error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
