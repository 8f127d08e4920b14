"""The families of models and what was verified of each: the results of the tests that put all through every check.

`make test-families` writes them to `families.json`, a family at a time. The long tests hold the file to what they find
for every family, the default ones for those that people use most.
"""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

RECORD = Path(__file__).with_name("families.json")
OK, NOT_APPLICABLE, NOT_TRIED = "ok", "-", "not tried"

CHECKS = {
    "load": "every tensor is the one that transformers loads",
    "loss": "the loss is the cross entropy of the model's own logits",
    "pack": "the loss of packed samples is that of each by itself",
    "adapt": "logits with an adapter are those of the weights W + s B A",
    "train": "20 steps reach a lower loss, and validation runs",
    "nf4": "logits on NF4 codes are those of the weights they stand for, and training on them lowers the loss",
    "fsdp": "two ranks that share the model train the adapter that one process does",
    "experts": "logits with adapted experts are those of whole weights",
    "generate": "answers of a batch are those that each prompt gets alone",
    "resume": "`train`, stopped and resumed, writes the bytes of a run that never stopped",
    "evaluate": "`evaluate` has the loss of the run's validation; `generate` and `merge` take the run",
    "merge": "transformers reads the merged model with the adapter's logits",
    "peft": "HF PEFT reads our adapter with equal logits",
    "from_peft": "an adapter of HF PEFT is read here with equal logits",
    "gguf": "a GGUF file of the whole model is read back with equal logits",
    "gguf_lora": "a GGUF file of the adapter is read back with equal logits",
}
"""The meaning of ok in each column."""


@dataclass(frozen=True)
class Family:
    """The findings for one family."""

    model_type: str
    """Its name in a config.json."""
    transformers: str
    """Version of transformers it was found with."""
    cells: dict[str, str]
    """Check -> ok, - where there is nothing to check, not tried, else why it is refused or how it failed."""


@cache
def families() -> dict[str, Family]:
    """Return every family by model type, in the file's order."""
    found = json.loads(RECORD.read_text())
    return {name: Family(name, row["transformers"], row["cells"]) for name, row in found.items()}


COLUMNS = {
    "train": ("load", "loss", "adapt", "train", "resume"),
    "pack": ("pack",),
    "NF4": ("nf4",),
    "FSDP": ("fsdp",),
    "experts": ("experts",),
    "generate": ("generate", "evaluate"),
    "merge": ("merge",),
    "PEFT": ("peft", "from_peft"),
    "GGUF": ("gguf", "gguf_lora"),
}
"""A user's tasks, and the checks that have to be ok for each."""


def in_short(family: Family, column: str) -> str:
    """Return yes, no, -, not tried, or what a family passes of a column of `COLUMNS`."""
    cells = {check: family.cells[check] for check in COLUMNS[column]}
    passed = [check for check, cell in cells.items() if cell == OK]
    if len(passed) == len(cells):
        return "yes"
    return ", ".join(passed) or next((cell for cell in cells.values() if cell in (NOT_APPLICABLE, NOT_TRIED)), "no")


def refusals() -> dict[tuple[str, str], list[str]]:
    """Return the families that each check refuses, by check and reason, the reason without the family's name."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, family in families().items():
        for check, cell in family.cells.items():
            if cell not in (OK, NOT_APPLICABLE, NOT_TRIED):
                said = re.sub(rf"\b{re.escape(name)}\b", "the family", cell)
                said = re.sub(r"\w+For(CausalLM|\w+Generation)|\w+LMHeadModel", "the model", said)
                found.setdefault((check, said), []).append(name)
    return found
