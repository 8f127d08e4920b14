"""Several sets of rows in one training: the options of each, and its share of the tokens."""

import logging
import re
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_peft.data.config import DataConfig
from lightning_peft.data.formats import check_format
from lightning_peft.interpolation import escaped

log = logging.getLogger(__name__)

OF_THE_MIXTURE = frozenset(
    ("rows", "task", "layout", "template_options", "max_length", "packing", "micro_batch_size", "streaming")
    + ("shuffle_window", "cache_dir", "num_workers", "preview", "sources", "temperature")
)
"""Options of `data` that all sources share."""
OF_A_SOURCE = ("train_path", "validation_path", "hub_name", "hub_config", "hub_validation_split")
"""Options that name rows: beside `sources` each would be read several times."""
_MIXING = ("weight", "max_epochs")


@dataclass(frozen=True)
class MixedSource:
    """One of the sets of rows that are mixed."""

    name: str
    """Empty where it is the only one."""
    config: DataConfig
    """Options of the source's rows, those of the mixture included."""
    weight: float | None = None
    max_epochs: int | None = None


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Let the message of a ValueError raised inside begin with the source that it is about."""
    try:
        yield
    except ValueError as error:
        if name and error.args and isinstance(error.args[0], str) and not error.args[0].startswith("data.sources."):
            error.args = (f"data.sources.{name}: {error.args[0]}", *error.args[1:])
        raise


def sources_of(config: DataConfig) -> list[MixedSource]:
    """Return the sources of `data.sources`, or that of `data` itself where there are none.

    Raises ValueError for options that a source does not have, and for weights that say nothing.
    """
    if not config.sources:
        check_format(config.format)
        return [MixedSource("", config)]
    if not isinstance(config.sources, dict):
        raise ValueError(
            f"data.sources={config.sources}: must be options by name, as in data.sources.a.train_path=FILE"
        )
    for option in OF_A_SOURCE:
        if (value := getattr(config, option)) is not None:
            raise ValueError(f"data.{option}={value}: data.sources name the rows; give it to one of them, or alone")
    sources = [_source_of(str(name), given, config) for name, given in config.sources.items()]
    weighted = [source.name for source in sources if source.weight is not None]
    if weighted and len(weighted) < len(sources):
        bare = next(source.name for source in sources if source.weight is None)
        raise ValueError(
            f"data.sources.{bare}.weight=null: give every source a weight, or none of them, which goes by their sizes"
        )
    if weighted and not any(source.weight for source in sources):
        raise ValueError("data.sources: every weight is 0, so there is nothing to train on")
    trained = [source for source in sources if source.weight != 0]
    if all(source.max_epochs is not None for source in trained):
        raise ValueError(
            f"data.sources.{trained[0].name}.max_epochs={trained[0].max_epochs}: every source has an end, so what "
            "follows it is not known; leave it out of one (trainer.max_epochs ends the run)"
        )
    if config.streaming and not weighted:
        raise ValueError("data.sources: the sizes of streamed rows are not known, so give each a weight")
    return sources


def shared_option(config: DataConfig, option: str, without: Container[str] = ()) -> Any:
    """Return the value of an option that all trained sources have; that of `data`, with a line, where they differ.

    without: names of sources that the option does not concern.
    """
    sources = [source for source in sources_of(config) if source.weight != 0 and source.name not in without]
    values = {source.name: getattr(source.config, option) for source in sources}
    first = next(iter(values.values()), getattr(config, option))
    if all(value == first for value in values.values()):
        return first
    given = ", ".join(f"{name} {value!r}" for name, value in values.items())
    own = getattr(config, option)
    log.warning("data.sources differ in %s (%s): beyond their rows it is data.%s=%r", option, given, option, own)
    return own


def validation_losses(config: DataConfig) -> list[str]:
    """Name what a validation under the options gives: the loss, and that of each source of a mixture."""
    names = [source.name for source in sources_of(config)]
    return ["validation_loss", *(f"validation_loss/{name}" for name in names if len(names) > 1)]


def _source_of(name: str, given: Any, config: DataConfig) -> MixedSource:
    key = f"data.sources.{name}"
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"{key}: a source's name is of letters, digits, _ and -")
    if not isinstance(given, dict) or not given:
        raise ValueError(f"{key}={given}: must hold options, as in {key}.train_path=FILE")
    known = {entry.name for entry in fields(DataConfig)} - OF_THE_MIXTURE | set(_MIXING)
    for option in given:
        if option in OF_THE_MIXTURE:
            raise ValueError(f"{key}.{option}: all sources share it, so give data.{option}")
        if option not in known:
            near = get_close_matches(str(option), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{key}.{option}: no such option of a source{hint}")
    weight, max_epochs = (given.get(option) for option in _MIXING)
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if weight is not None and not (is_number and 0 <= weight < float("inf")):
        raise ValueError(f"{key}.weight={weight}: must be a number from 0 on")
    if max_epochs is not None and (type(max_epochs) is not int or max_epochs < 1):
        raise ValueError(f"{key}.max_epochs={max_epochs}: must be a whole number of passes, at least 1, or null")
    options = {option: value for option, value in given.items() if option not in _MIXING}
    if "source" not in options and (named := {"train_path": "files", "hub_name": "hub"}.keys() & options.keys()):
        if len(named) > 1:
            raise ValueError(f"{key}: has train_path and hub_name; make two sources of them")
        options["source"] = "files" if "train_path" in named else "hub"
    shared = {
        entry.name: getattr(config, entry.name)
        for entry in fields(DataConfig)
        if entry.name not in ("sources", "temperature")
    }
    try:
        merged = OmegaConf.merge(OmegaConf.structured(DataConfig), escaped(shared), escaped(options))
    except OmegaConfBaseException as error:
        raise ValueError(f"{key}.{error.full_key}: {str(error).splitlines()[0]}") from error
    with naming(name):
        own = OmegaConf.to_object(merged)
    assert isinstance(own, DataConfig)
    check_format(own.format, f"{key}.format")
    return MixedSource(name, own, None if weight is None else float(weight), max_epochs)


def shares_of(sources: Sequence[MixedSource], tokens: Sequence[int], temperature: float) -> list[float]:
    """Return what part of the tokens each source has: weights, or sizes, to the power 1 / temperature, adding up to 1.

    tokens: the size of each.
    """
    sizes = [size if source.weight is None else source.weight for source, size in zip(sources, tokens, strict=True)]
    powers = [size if temperature == 1 else size ** (1 / temperature) if size else 0.0 for size in sizes]
    return [power / sum(powers) for power in powers]
