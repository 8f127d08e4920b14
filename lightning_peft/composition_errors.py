"""Errors of Hydra and OmegaConf in the words of the command line: one line with the key, the value and the remedy."""

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    GrammarParseError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from lightning_peft.config import TrainConfig
from lightning_peft.options import options_of
from lightning_peft.other_tools import BY_THEIRS, LISTS, ours, what_instead
from lightning_peft.readable import first_line
from lightning_peft.schemas import CONF_DIR, ROOTS, register_schemas
from lightning_peft.words import no_such_option, options_of_group, roots_of
from lightning_peft.written_numbers import number_meant, with_commas


@contextmanager
def explained(command: str) -> Iterator[None]:
    """Turn what Hydra and OmegaConf raise inside into a ValueError in the words of the command line."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error, command)) from error


def explain(error: Exception, command: str) -> str:
    """Return Hydra's or OmegaConf's message as one line in the words of the command line."""
    text = str(error)
    if isinstance(error, MissingConfigException) and (missing := re.search(r"Could not find '([^']+)'", text)):
        group, _, option = missing.group(1).rpartition("/")
        if (folder := group.partition("/")[0]) in ("data", "model"):  # a path of the hub, and no folder of options
            group, option = folder, missing.group(1).removeprefix(f"{folder}/")
            return no_such_option(group, option, options_of_group(group))
        if folder == "recipe":  # their folders are part of their names
            return no_such_option(folder, missing.group(1).removeprefix("recipe/"), options_of_group(folder))
        options = re.findall(r"^\t([\w/.-]+)$", text.split("Config search path")[0], re.MULTILINE)
        named = [name for name in options if name != "schema" and not name.endswith("_schema")]
        return no_such_option(group, option, named)
    if isinstance(error, OverrideParseException):
        name = error.override.lstrip("+").partition("=")[0]
        if name[:1].isdigit() and (known := ours(name)) is not None:  # 4bit, which is no key for Hydra
            return f"{name}: no such option; use {known}"
        if (known := ours(name) or name).partition("=")[0] in roots_of(command) and name == error.override:
            value = "" if "=" in known else "=VALUE"
            return f"{name}: not of the form key=value; give it a value, as in {known}{value}"
        return f"{error.override.lstrip('+')}: {unreadable(*error.override.partition('=')[::2])}"
    if several := re.search(r"Sweep parameters '(.*)' requires --multirun", text):
        return f"{several.group(1)}: several values; add -m for a sweep"
    if isinstance(error, ConfigCompositionException):
        if unknown := re.search(r"Could not override '([^']+)'", text):
            return f"{unknown.group(1)}: no such option{nearest(unknown.group(1), command)}"
        if merging := re.search(r"Error merging override (.*)", text):
            word = merging.group(1).lstrip("+")
            return f"{word}: {plainly(first_line(error.__cause__ or error), word.partition('=')[0])}"
        if ambiguous := re.search(r"Ambiguous value for argument '(.*)'", text):
            key, _, values = ambiguous.group(1).lstrip("+").partition("=")
            if (known := ours(key)) is not None and known != key and "=" not in known:
                right = f"{known}=[{values}]" if known in LISTS else f"-m for a sweep, with {known}={values}"
                return f"{key}: no such option; use {right}"
            one = f"; one number is {key}={number}" if (number := with_commas(values)) else ""
            said = f"several values; add -m for a sweep, or write a list as key=[a,b]{one}"
            return f"{ambiguous.group(1).lstrip('+')}: {said}"
    if isinstance(error, MissingMandatoryValue) and (key := getattr(error, "full_key", None)):
        meanings = {option.key: option.doc for option in options_of(ROOTS.get(command, TrainConfig))}
        return f"{key}=...: has to be given" + (f"; {meanings[key]}" if key in meanings else "")
    if missing := re.search(r"Error resolving interpolation '([^']+)'", text):
        return f"{missing.group(1)}: refers to nothing that is there; ${{oc.env:NAME}} is a variable of the environment"
    key, message = getattr(error, "full_key", None), first_line(error)
    if key and (found := NO_NUMBER.search(message)):
        return f"{key}={found['value']}: {plainly(message, key)}"
    return f"{key}: {plainly(message)}" if key else plainly(message)


IN_PLAIN_WORDS = {
    r"is not a ListConfig, list or tuple": "must be a list, in brackets, as [a,b]",
    r"is not a valid bool": "must be true or false",
    r"field '.*' is not Optional": "null is no value of it; leave it out for the default",
    r"Cannot convert 'list' to string": "must be a text and no list; put it in quotes",
    r"Cannot convert 'dict' to string": "must be a text and have no keys inside",
    r"Cannot merge DictConfig with ListConfig": "must be keys with values, and no list",
    r"is not a subclass of|Cannot assign \w+ to Dict": "must be keys with values inside, as --help lists them",
}
"""Words of OmegaConf -> the remedy."""


NO_NUMBER = re.compile(r"Value '(?P<value>.*?)' of type .*could not be converted to (?P<kind>Integer|Float)")
"""OmegaConf's words for a value of a key that takes a number."""


def unreadable(key: str, value: str) -> str:
    """Say what is wrong with a value that Hydra's grammar does not take."""
    if (number := number_meant(value, key)) is not None:
        return f"must be a number; write {number}"
    if re.fullmatch(r"[({[][\w./-]+(\s*[,;]\s*[\w./-]+)*[)}\]]", value):
        return f"a list is written in brackets, as [{','.join(re.split(r'[,;]', value[1:-1]))}]"
    return "not of the form key=value (quote text with special characters)"


def plainly(message: str, key: str = "") -> str:
    """Return OmegaConf's message about the value of `key` with the remedy behind it, or in its place."""
    if found := NO_NUMBER.search(message):
        is_whole = found["kind"] == "Integer"
        number = number_meant(found["value"], key, is_whole=is_whole)
        kind, example = ("a whole number", "") if is_whole else ("a number", ", as in 2e-4")
        return f"must be {kind}" + (example if number is None else f"; write {number}")
    right = next((words for pattern, words in IN_PLAIN_WORDS.items() if re.search(pattern, message)), None)
    return message if right is None else f"{message}; {right}"


def unresolved(config: DictConfig, prefix: str = "") -> str | None:
    """Say which value refers by ${...} to what is not there; None where each resolves by itself."""
    for key in map(str, config):
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_interpolation():
            if not node._is_none() and not node._is_missing() and (found := unresolved(node, f"{prefix}{key}.")):
                return found
            continue
        try:
            OmegaConf.to_container(OmegaConf.create([config[key]]), resolve=True)
        except (InterpolationResolutionError, GrammarParseError) as error:
            written = str(node._value() if node is not None and not isinstance(node, ListConfig) else node)
            return (
                f"{prefix}{key}={written}: {first_line(error)}; ${{...}} refers to another key, or to a variable of "
                "the environment as ${oc.env:NAME}"
            )
        except MissingMandatoryValue:
            continue
    return None


def nearest(key: str, command: str, groups: Sequence[str] = ()) -> str:
    """Return our word for another tool's, else the options of the command that look like a mistyped one."""
    if (known := ours(key)) is not None and known != key:
        is_file = known == "run_dir" and "output" in list(groups_and_defaults(command)[1])
        return f"; use {'output' if is_file else known}"
    if (instead := what_instead(key)) is not None:
        return f"; {instead}"
    if key.startswith("sweep.") and command != "submit_sweep":
        return "; it is of a sweep, which -m begins"
    choices, config = groups_and_defaults(command)
    group = key.partition(".")[0]
    if group in choices and key in leaf_keys(config):  # another choice than the default was made
        owner = "method" if group == "adapter" else group
        return f"; {owner}={choices[owner]} has it, and what was chosen has not"
    typed_key = key.lower().replace("-", "_")
    matches = difflib.get_close_matches(
        typed_key, dict.fromkeys([*choices, *groups, *leaf_keys(config)]), n=3, cutoff=0.6
    )
    if theirs := difflib.get_close_matches(typed_key.rpartition(".")[2], BY_THEIRS, n=1, cutoff=0.85):
        matches = [BY_THEIRS[theirs[0]], *(match for match in matches if match != BY_THEIRS[theirs[0]])][:3]
    matches = [match for match in matches if match != key]  # another command has it
    if not matches and (leaf := typed_key.rpartition(".")[2]) in (*choices, *config):
        matches = [leaf]
    return f"; did you mean {', '.join(matches)}?" if matches else ""


def groups_and_defaults(command: str) -> tuple[dict[str, str], DictConfig]:
    """Return the command's config groups with their default options, and its config when nothing is overridden."""
    register_schemas()
    with initialize_config_dir(str(CONF_DIR.resolve()), version_base="1.3"):
        config = compose(command, return_hydra_config=True)
    chosen = {str(group): str(option) for group, option in config.hydra.runtime.choices.items()}
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    return {group: option for group, option in chosen.items() if not group.startswith("hydra")}, config


def leaf_keys(config: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for key in map(str, config):
        node = config._get_node(key)
        name = f"{prefix}{key}"
        keys.append(name)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            keys += leaf_keys(node, f"{name}.")
    return keys
