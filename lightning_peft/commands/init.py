"""`lightning-peft init my.yaml [method=... model=... data=...]`: a file of one's own to start from, with comments."""

import textwrap
from pathlib import Path
from typing import Any

import yaml

from lightning_peft.checkpoint.atomic import write_text
from lightning_peft.compose import compose_config
from lightning_peft.config import plain
from lightning_peft.help import GROUPS, TRAINER, flat
from lightning_peft.options import options_of
from lightning_peft.words import everyday

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
    """Write the file. Raises ValueError for a file that exists, and for choices that do not compose."""
    names = [word for word in words if "=" not in word]
    choices = [word for word in words if "=" in word]
    if len(names) > 1:
        raise ValueError(f"{names[1]}: init writes one file; choices are written as in method=qlora")
    path = Path(names[0]) if names else Path("my.yaml")
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{path}: must end in .yaml, so that train knows it for a file")
    if path.exists():
        raise ValueError(f"{path}: exists already; name another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text_of(path, choices))
    print(f"{path}: edit it, then: lightning-peft train {path}")


def text_of(path: Path, choices: list[str]) -> str:
    """The file's content for some choices, which are composed to see that they can be."""
    config = compose_config("train", everyday("train", choices))
    values = flat(plain(config))
    docs = {option.key: option.doc for option in options_of(type(config))}
    docs |= {option.key: option.doc for option in options_of(type(config.adapter), "adapter.")}
    docs |= TRAINER
    given = dict(word.partition("=")[::2] for word in choices)
    lines = [f"# lightning-peft train {path}", "# Words after the file win: lightning-peft train "
             f"{path} optimizer.lr=1e-4", ""]  # fmt: skip
    for group in CHOICES:
        lines += comment(f"{GROUPS[group]}; lightning-peft train --help {group}", "")
        lines += [f"{group}: {scalar(given.get(group, DEFAULTS[group]))}", ""]
    shown = {key: values[key] for key in KEYS if key in values}
    shown |= {key: value for key, value in typed_keys(choices).items() if key not in shown}
    sections: dict[str, list[str]] = {}
    for key in shown:
        sections.setdefault(key.partition(".")[0] if "." in key else "", []).append(key)
    for section, keys in sections.items():
        if section in CHOICES and section in ("data", "model", "logger"):
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
    return "\n".join([*lines, "# run_dir: runs/mine    (else named by time, method and model)"]) + "\n"


def typed_keys(choices: list[str]) -> dict[str, Any]:
    """The keys with a dot among the choices, as YAML reads their values."""
    pairs = (word.partition("=")[::2] for word in choices)
    return {key.lstrip("+"): yaml.safe_load(value) for key, value in pairs if "." in key}


def comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, 78, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ") if text else []


def scalar(value: Any) -> str:
    """A value as one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).strip()
    return text.removesuffix("\n...").removesuffix("...").strip()
