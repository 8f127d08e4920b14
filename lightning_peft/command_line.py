"""Runs one command, or a sweep of it, and turns what goes wrong into one line and an exit status."""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from lightning_peft.compose import compose_config, groups_and_defaults, typed
from lightning_peft.config import CONF_DIR, register_schemas

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130

LIBRARY_NOISE = ("'set_vital' is deprecated", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
"""Deprecations inside torchdata and Lightning that a user can do nothing about."""


def run_command(command: str, function: Callable[[Any], Any], overrides: list[str]) -> int:
    """Compose, run, and return the exit status. LIGHTNING_PEFT_TRACEBACK=1 shows where a one-line error came from."""
    set_up_logging()
    if any(word in ("-h", "--help") for word in overrides):
        print(command_help(command))
        return DONE
    sweep = [word for word in overrides if word in ("-m", "--multirun")]
    try:
        if sweep:
            run_sweep(command, function, [word for word in overrides if word not in sweep])
        else:
            function(compose_config(command, overrides))
    except (ValueError, OSError) as error:
        if os.environ.get("LIGHTNING_PEFT_TRACEBACK"):
            traceback.print_exc()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return DONE


def run_sweep(command: str, function: Callable[[Any], Any], overrides: list[str]) -> None:
    """Hand the sweep to Hydra's sweeper and launcher; `run_dir=X` names the sweep's folder."""
    register_schemas()
    words = []
    for word in overrides:
        words.append(word.replace("run_dir=", "hydra.sweep.dir=", 1) if word.startswith("run_dir=") else word)

    @hydra.main(config_path=str(CONF_DIR.resolve()), config_name=command, version_base="1.3")
    def job(config: DictConfig) -> Any:
        return function(typed(config))

    arguments = sys.argv
    sys.argv = [arguments[0], "--multirun", *words, "run_dir=${hydra:runtime.output_dir}"]
    try:
        job()
    finally:
        sys.argv = arguments


def set_up_logging() -> None:
    """One line a message, on stderr, ours from INFO and others' from WARNING."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("lightning_peft").setLevel(logging.INFO)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in LIBRARY_NOISE:
        warnings.filterwarnings("ignore", message)


def command_help(command: str) -> str:
    """Groups with their options, and the keys of the command with their defaults."""
    register_schemas()
    choices, config = groups_and_defaults(command)
    lines = [f"usage: lightning-peft {command} [group=option] [key=value] ...", "", "groups (default first):"]
    for group, default in choices.items():
        paths = [path.relative_to(CONF_DIR / group).with_suffix("") for path in (CONF_DIR / group).glob("**/*.yaml")]
        options = sorted(map(str, paths))
        lines.append(f"  {group:<16} {', '.join(dict.fromkeys([default, *options]))}")
    return "\n".join([*lines, "", "keys and defaults:", OmegaConf.to_yaml(config)])
