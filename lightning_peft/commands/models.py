"""`lightning-peft models [MODEL]`: the checks of each family of models, and of one, with the reasons."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_peft.compose import compose_config
from lightning_peft.models.families import CHECKS, COLUMNS, NOT_APPLICABLE, NOT_TRIED, OK, Family, families, in_short
from lightning_peft.schemas import CONF_DIR
from lightning_peft.words import everyday

WIDTH = 100
"""Columns that the table of all families takes, also where a terminal has fewer and a pipe none."""


def models(words: list[str]) -> None:
    """Print every family in a line, or one family's checks. Raises ValueError for a word that names no model."""
    if len(words) > 1 or any("=" in word for word in words):
        raise ValueError(f"models: takes one family, folder, hub id or option of model= at most, not {' '.join(words)}")
    if not words:
        _show_all(families())
        return
    types = [words[0]] if words[0] in families() else model_types(words[0])
    if found := next((families()[name] for name in types if name in families()), None):
        _show_one(found)
    else:
        print(
            f"{words[0]}: {types[0]} is none of the {len(families())} families verified; train compares any model's "
            "loss, packing and saved adapter with transformers and HF PEFT, and says what differs"
        )


def model_types(word: str) -> Sequence[str]:
    """Return the model type in the configuration of a folder, hub id or option of `model=`, and its text part's."""
    is_option = (CONF_DIR / "model" / f"{word}.yaml").is_file()
    if not is_option and "/" not in word and not Path(word).exists():
        near = difflib.get_close_matches(word.lower().replace("-", "_"), families(), n=3, cutoff=0.5)
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise ValueError(f"models: {word} is no family, folder, hub id or option of model={hint}")
    from lightning_peft.models.loading import model_config  # transformers, which the table does without

    config = model_config(compose_config("train", everyday("train", [f"model={word}"])).model)
    return [config.model_type, config.get_text_config().model_type]


def _show_all(found: dict[str, Family]) -> None:
    table = Table("family", *COLUMNS, box=None, pad_edge=False)
    for name, family in found.items():
        table.add_row(name, *(in_short(family, column) for column in COLUMNS))
    Console(width=max(Console().width, WIDTH)).print(table)
    versions = sorted({family.transformers for family in found.values()})
    print(f"{len(found)} families with transformers {', '.join(versions)}; `lightning-peft models FAMILY` says why not")


def _show_one(family: Family) -> None:
    table = Table("check", "found", "", box=None, pad_edge=False)
    for check, cell in family.cells.items():
        is_word = cell in (OK, NOT_APPLICABLE, NOT_TRIED)
        table.add_row(check, cell if is_word else "refused", CHECKS[check] if is_word else cell)
    Console().print(table)
    print(f"{family.model_type}, on a small random model, with transformers {family.transformers}")
