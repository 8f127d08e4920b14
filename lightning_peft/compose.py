"""Compose the words on the command line into a typed config, with errors of one line."""

import difflib
import logging
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from yaml import YAMLError, safe_load

from lightning_peft import distributed
from lightning_peft.compat import config_loader_of
from lightning_peft.composition_errors import explain, explained, leaf_keys, nearest, unresolved
from lightning_peft.config import TrainConfig, check_finite, train_config
from lightning_peft.own_file import in_quotes
from lightning_peft.plugins import OWN_FILES, import_modules, import_plugins, imported_by_words
from lightning_peft.readable import first_line
from lightning_peft.schemas import CONF_DIR, register_schemas
from lightning_peft.slips import OPEN, TEXT, VERBATIM
from lightning_peft.tables import TABLES

logger = logging.getLogger(__name__)


def quote_text_values(overrides: list[str]) -> list[str]:
    """Quote the values of text keys for Hydra's grammar, so that , ' " = ( { need no escaping in the shell."""
    quoted = []
    for override in overrides:
        key, _, value = override.partition("=")
        is_quoted = len(value) > 1 and value[0] in "'\"" and value[-1] == value[0]
        if VERBATIM.match(override) and value not in ("", "null") and not is_quoted:
            override = f"{key}={in_quotes(value)}"
        if TEXT.match(override):
            override = re.sub(r"(?<!\\)((?:\\\\)*)\$\{", r"\1\\${", override)
        quoted.append(override)
    return quoted


def quoted_texts(words: list[str]) -> list[str]:
    """Quote text for a model among the words of a sweep, unless it reads as several values of its key."""
    parser = OverridesParser.create()
    written = []
    for word in words:
        if TEXT.match(word):
            try:
                is_swept = parser.parse_override(word).is_sweep_override()
            except HydraException:
                is_swept = False
            word = word if is_swept else quote_text_values([word])[0]
        written.append(word)
    return written


SEARCH_PATH = "hydra.searchpath"
"""Hydra's key for folders of one's own option files, as in hydra.searchpath=[file:///home/me/conf]."""


def open_words(overrides: list[str]) -> list[str]:
    """Return words of open dictionaries as Hydra wants them, so that nobody needs to know whether a key is there."""
    return [f"++{override}" if OPEN.match(override) else override for override in overrides]


def compose_config(command: str, overrides: list[str]) -> Any:
    """Return the typed root config of a command.

    Raises ValueError with one line that names the key, the value and the remedy.
    """
    if any(word.startswith("config_path=") for word in overrides):
        return saved_config(command, overrides)
    with explained(command):
        return typed(composed(command, overrides))


def composed(command: str, overrides: list[str]) -> DictConfig:
    """Return the config of a command before its values are resolved and typed."""
    import_plugins(TABLES)
    overrides = imported_by_words(overrides, TABLES)
    register_schemas()
    check_adapter_has_method(overrides)
    check_no_hydra_words(overrides)
    if distributed.world_size() > 1 and not any(word.startswith("run_dir=") for word in overrides):
        raise ValueError("run_dir: give one, or config_path=, where several ranks are started: each would name its own")
    with initialize_config_dir(str(CONF_DIR.resolve()), version_base="1.3"):
        words = open_words(quote_text_values(overrides))
        try:
            config = compose(command, words)
        except AssertionError as error:  # OmegaConf raises it for a key below null
            if (key := key_of_null_part(command, words)) is None:
                raise
            part = key.partition(".")[0]
            raise ValueError(
                f"{key}: {part} is null for {command} until one is chosen; choose one first, as in "
                f"{part}=NAME {key}=VALUE"
            ) from error
        unknown = next(unknown_keys(config), None)
        groups = config_loader(overrides).list_groups("") if unknown is not None else []
    if unknown is not None:
        raise ValueError(f"{unknown}: no such option{nearest(unknown, command, groups)}")
    check_stopping(overrides, config)
    return config


def check_stopping(overrides: list[str], config: DictConfig) -> None:
    """Raise ValueError for words of early stopping where nothing is watched, unless a word says so by metric=null."""
    given = [word.partition("=")[0].lstrip("+") for word in overrides]
    rules = [key for key in given if key in ("early_stopping.patience", "early_stopping.min_delta")]
    if not rules or "early_stopping.metric" in given:
        return
    rule: Any = OmegaConf.to_object(config.early_stopping)  # its own checks come first
    if rule.metric is None:
        value = getattr(rule, rules[0].partition(".")[2])
        raise ValueError(f"{rules[0]}={value}: nothing is watched; give early_stopping.metric")


def key_of_null_part(command: str, words: list[str]) -> str | None:
    """Return the first key below a part that is null until it is chosen, as data.x of evaluate; None without one."""
    keys = [(word, word.partition("=")[0].lstrip("+~")) for word in words]
    config = compose(command, [word for word, key in keys if "." not in key or key.startswith("hydra.")])
    return next((key for _, key in keys if "." in key and config.get(key.partition(".")[0], "") is None), None)


def check_adapter_has_method(overrides: list[str]) -> None:
    """Raise ValueError for adapter=NAME without a method, which would leave rank, rate and name to another method."""
    given = dict(word.partition("=")[::2] for word in overrides)
    if (name := given.get("adapter")) is not None and "method" not in given:
        raise ValueError(f"adapter={name}: use method={name}, which also sets what goes with it")


def check_no_hydra_words(overrides: list[str]) -> None:
    """Raise ValueError for words to Hydra itself, which a single run would pass over in silence."""
    for word in overrides:
        key = word.partition("=")[0].lstrip("+~")
        if key.startswith(("hydra.", "hydra/")) and key != SEARCH_PATH:
            raise ValueError(f"{word}: a single run reads {SEARCH_PATH} alone; launchers and sweepers are for train -m")


def check_hydra_words(command: str, words: list[str]) -> None:
    """Raise ValueError for a word of a sweep that names no option of Hydra's, or of its sweeper or launcher."""
    own = [word for word in words if word.partition("=")[0].lstrip("+~").startswith(("hydra.", "hydra/"))]
    register_schemas()
    with explained(command), initialize_config_dir(str(CONF_DIR.resolve()), version_base="1.3"):
        config = compose(command, own, return_hydra_config=True)
        chosen = compose(command, [word for word in own if word.startswith("hydra/")], return_hydra_config=True)
    known = leaf_keys(chosen.hydra, "hydra.")  # its own files have keys that its dataclasses lack
    if (unknown := next((key for key in unknown_keys(config.hydra, "hydra.") if key not in known), None)) is not None:
        matches = difflib.get_close_matches(unknown, known, n=1)
        raise ValueError(f"{unknown}: no such option{f'; did you mean {matches[0]}?' if matches else ''}")


FORMER_PATHS = {
    f"lightning_peft.training.{name}": f"lightning_peft.tracking.{name}"
    for name in ("metrics_csv.MetricsCSV", "loggers.TensorBoard", "wandb_run.WandbRun")
}
"""The path of a class now, by the path that the `config.yaml` of an earlier version has."""


def saved_config(command: str, overrides: list[str]) -> TrainConfig:
    """Return the config of `train config_path=RUN/config.yaml`, which every rank of a run is started from.

    The file is the whole config: the words beside it say at most how the run goes on.
    """
    path = Path(next(word for word in overrides if word.startswith("config_path=")).partition("=")[2].strip("'\""))
    beside = dict(word.partition("=")[::2] for word in overrides if not word.startswith("config_path="))
    if command != "train" or not beside.keys() <= {"resume", "pause_at"}:
        raise ValueError(
            f"config_path={path}: only train takes it, with nothing but resume= and pause_at= beside it, as it is the "
            "whole config"
        )
    try:
        saved = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        if not isinstance(saved, dict) or not saved.keys() >= {"adapter", "optimizer"}:
            raise ValueError(f"config_path={path}: not the config.yaml of a run")
        import_plugins(TABLES)
        import_modules(saved.get("imports", []), TABLES, kept=path.parent / OWN_FILES)
        named = {str(key): value for key, value in saved.items()}
        named |= {key: safe_load(value) for key, value in beside.items()}
        return train_config(in_folder_of(path, with_present_paths(named)))
    except FileNotFoundError as error:
        raise ValueError(f"config_path={path}: no such file") from error
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config_path={path}: {explain(error, command)}") from error


def with_present_paths(saved: dict[str, Any]) -> dict[str, Any]:
    """Return a saved config whose loggers are named by the modules that hold them now."""
    logger_nodes = saved.get("logger")
    if not isinstance(logger_nodes, dict):
        return saved
    nodes = {
        name: node | {"_target_": FORMER_PATHS.get(str(node["_target_"]), node["_target_"])}
        if isinstance(node, dict) and "_target_" in node
        else node
        for name, node in logger_nodes.items()
    }
    return saved | {"logger": nodes}


def in_folder_of(path: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """Return a saved config whose run is the one in the file's folder, also where that folder was copied or moved."""
    run_dir = saved.get("run_dir")
    if path.name != "config.yaml" or not run_dir or Path(run_dir).resolve() == path.parent.resolve():
        return saved
    logger.info("config_path=%s: names run_dir=%s, and is a copy: this run goes on in %s", path, run_dir, path.parent)

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: moved(part) for key, part in value.items()}
        return str(path.parent) if value == run_dir else value

    return {key: moved(value) for key, value in saved.items()}


def typed(config: DictConfig) -> Any:
    """Return the dataclass behind a composed config; runs every `__post_init__`."""
    try:
        if "run_dir" in config:
            # run_dir is resolved first, and once: it may hold a digest of the config, and other values refer to it.
            config.run_dir = config.run_dir
        check_finite(OmegaConf.to_container(config, resolve=True))
    except InterpolationResolutionError as error:
        raise ValueError(unresolved(config) or first_line(error)) from error
    made = OmegaConf.to_object(config)
    if isinstance(made, TrainConfig):
        made.check_directions()
    return made


def config_loader(words: list[str]) -> ConfigLoader:
    """Return Hydra's reader of option files and those of the words' own folders; inside `initialize_config_dir`."""
    path = GlobalHydra.instance().config_loader().get_search_path()
    for word in words:
        if word.startswith(f"{SEARCH_PATH}="):
            folders = OverridesParser.create().parse_override(word).value()
            for folder in folders if isinstance(folders, list) else [folders]:
                path.append("command line", str(folder))
    return config_loader_of(path)


def read_words(words: list[str]) -> list[Override]:
    """Return Hydra's reading of the words, with globs over option files, those of one's own folders included.

    Raises ValueError for a word that Hydra cannot read.
    """
    words = imported_by_words(words, TABLES)
    register_schemas()
    # Trials are composed in other working folders as well.
    words = [absolute_search_path(word) if word.startswith(f"{SEARCH_PATH}=") else word for word in words]
    with initialize_config_dir(str(CONF_DIR.resolve()), version_base="1.3"):
        loader = config_loader(words)
        parser, overrides = OverridesParser.create(), []
        for word in words:
            try:
                overrides.append(parser.parse_override(word))
            except OverrideParseException as error:
                raise ValueError(f"{word}: not of the form key=value (quote text with special characters)") from error
            except HydraException as error:
                raise ValueError(f"{word}: not of the form key=value,value") from error
            overrides[-1].config_loader = loader
    return overrides


def absolute_search_path(word: str) -> str:
    return re.sub(r"file://(?!/)", f"file://{Path.cwd()}/", word)


def unknown_keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yield the keys that no dataclass of the config has: Hydra adds whatever is typed with a + before it."""
    kind = OmegaConf.get_type(config)
    known = {f.name for f in fields(kind)} if kind is not None and is_dataclass(kind) else None
    for key in map(str, config):
        node = config._get_node(key)
        if known is not None and key not in known:
            yield f"{prefix}{key}"
        elif isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            yield from unknown_keys(node, f"{prefix}{key}.")
