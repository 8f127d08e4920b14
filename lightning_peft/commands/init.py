"""`lightning-peft init my.yaml [method=... model=... data=...]`: a file of one's own to start from, with comments."""

import textwrap
from pathlib import Path
from typing import Any

import yaml

from lightning_peft.checkpoint.atomic import write_text
from lightning_peft.compose import compose_config, quote_text_values, read_words
from lightning_peft.config import TrainConfig, plain
from lightning_peft.help import GROUPS, TRAINER, flat
from lightning_peft.options import options_of
from lightning_peft.own_file import words_of_text
from lightning_peft.slips import TEXT
from lightning_peft.words import OF_ONE_KEY, everyday

CHOICES = ("method", "model", "data", "hardware", "logger")
"""Groups the file names, with what is chosen or the default."""
KEYS = (
    "data.validation_path", "data.max_length", "data.micro_batch_size", "data.system_prompt", "adapter.rank",
    "adapter.alpha", "adapter.dropout", "optimizer.lr", "trainer.max_epochs", "trainer.accumulate_grad_batches",
    "validation.every_n_steps", "checkpoint.every_n_steps", "seed",
)  # fmt: skip
"""Keys the file shows with the values that the choices give them."""
DEFAULTS = {"method": "lora", "model": "smollm2_135m", "data": "text_to_sql", "hardware": "auto", "logger": "csv"}


def init(words: list[str]) -> None:
    """Write the file, in which every choice stands. Raises ValueError for a file that exists, and as `text_of` does."""
    names = [word for word in words if "=" not in word and not word.startswith("~")]
    choices = [word for word in words if word not in names]
    if len(names) > 1:
        raise ValueError(f"{names[1]}: init writes one file; choices are written as in method=qlora")
    path = Path(names[0]) if names else Path("my.yaml")
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{path}: must end in .yaml, so that train knows it for a file")
    if path.exists():
        raise ValueError(f"{path}: exists already; name another file")
    text = text_of(path, choices)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    print(f"{path}: edit it, then: lightning-peft train {path}")


def text_of(path: Path, choices: list[str]) -> str:
    """Return a file's content for some choices. Raises ValueError for choices that do not compose or fit in no file."""
    refuse_what_no_file_says(path, choices)
    words = everyday("train", choices)
    place = [] if any(word.startswith("run_dir=") for word in words) else ["run_dir=mine"]
    config = compose_config("train", [*words, *place])
    text = written(path, plain(config), typed_values(choices), typed_values(words), docs_of(config))
    again = compose_config("train", everyday("train", [*words_of_text(text, path), *place]))
    if (lost := first_difference(plain(config), plain(again))) is not None:
        raise ValueError(f"{path}: {lost} by the file; leave that out, and type it behind: lightning-peft train {path}")
    return text


def refuse_what_no_file_says(path: Path, choices: list[str]) -> None:
    """Raise ValueError for a choice that takes something away, and for one that is a whole config itself."""
    for word in choices:
        if word.startswith("~"):
            raise ValueError(f"{word}: a file gives keys their values; use lightning-peft train {path} {word}")
        if word.startswith("config_path="):
            raise ValueError(f"{word}: is a whole config already; use lightning-peft train {word}")


def docs_of(config: TrainConfig) -> dict[str, str]:
    docs = {option.key: option.doc for option in options_of(type(config))}
    docs |= {option.key: option.doc for option in options_of(type(config.adapter), "adapter.")}
    return docs | TRAINER


def written(
    path: Path, config: dict[str, Any], typed: dict[str, Any], composed: dict[str, Any], docs: dict[str, str]
) -> str:
    """Return the file's lines: groups, then the keys used most with the values of `config`, then all else typed.

    `composed` is what was typed in Hydra's words, which name groups that follow from it, as data=jsonl of a file.
    """
    values = flat(config)
    lines = [f"# lightning-peft train {path}", "# Words after the file win: lightning-peft train "
             f"{path} optimizer.lr=1e-4", ""]  # fmt: skip
    groups = {group: typed.get(group, composed.get(group, DEFAULTS[group])) for group in CHOICES}
    if "recipe" in typed:  # a recipe chooses what is not typed
        groups = {group: choice for group, choice in groups.items() if group in typed}
    groups |= {key: value for key, value in typed.items() if key in GROUPS and key not in groups}
    for group, choice in groups.items():
        lines += comment(f"{GROUPS[group]}; lightning-peft train --help {group}", "")
        lines += [f"{group}: {scalar(choice)}", ""]
    said = {OF_ONE_KEY[group] for group in groups if group in OF_ONE_KEY}
    shown = {key: values[key] for key in KEYS if key in values and key not in said}
    shown |= {key: value for key, value in typed.items() if key not in shown and key not in groups}
    sections: dict[str, list[str]] = {}
    for key in shown:
        sections.setdefault(key.partition(".")[0] if "." in key else "", []).append(key)
    for section, keys in sections.items():
        if section in groups:
            # A group that is chosen by name takes its keys below by their full names.
            for key in keys:
                lines += [*comment(docs.get(key, ""), ""), f"{key}: {scalar(shown[key])}"]
            lines.append("")
            continue
        indent = "  " if section else ""
        lines += [f"{section}:"] if section else []
        for key in keys:
            name = key.partition(".")[2] if section else key
            lines += [*comment(docs.get(key, ""), indent), f"{indent}{name}: {scalar(shown[key])}"]
        lines.append("")
    if "run_dir" not in shown:
        lines.append("# run_dir: runs/mine    (else named by time, method and model)")
    return "\n".join(lines) + "\n"


def typed_values(words: list[str]) -> dict[str, Any]:
    """Return the keys of some words with their values, as Hydra reads them."""
    overrides = read_words(quote_text_values(words))
    return {
        word.partition("=")[0].lstrip("+"): as_typed(word, override.value())
        for word, override in zip(words, overrides, strict=True)
    }


def as_typed(word: str, value: Any) -> Any:
    """Return a value without what `quote_text_values` has put before the ${ of text."""
    return value.replace("\\${", "${") if TEXT.match(word) and isinstance(value, str) else value


def first_difference(asked: dict[str, Any], got: dict[str, Any]) -> str | None:
    """Return a sentence on the first value that differs; None where all are the same."""
    before, after = flat(asked), flat(got)
    for key in sorted(before.keys() | after.keys()):
        if (ours := before.get(key)) != (theirs := after.get(key)):
            return f"{key}={ours} would be {theirs}"
    return None


def comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, 78, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ") if text else []


def scalar(value: Any) -> str:
    """Return a value as one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).strip()
    return text.removesuffix("\n...").removesuffix("...").strip()
