"""The origin of an adapter: base, config, data and versions."""

import importlib.metadata
import json
import logging
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any

logger = logging.getLogger(__name__)

FILE_NAME = "lineage.json"
PACKAGES = ("lightning-peft", "torch", "lightning", "transformers", "bitsandbytes", "safetensors")


KINDS: dict[str, type | UnionType] = {
    "base_fingerprint": str, "base_name": str | None, "quantization": str, "precision": str | None, "config": dict,
}  # fmt: skip
"""Types of values that are read where an adapter is loaded."""


class LineageError(ValueError):
    """An adapter that belongs to another base, or a lineage file that cannot be read."""


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide numbers; absent ones are left out."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


EXPORTED_BY = "lightning-peft export"
"""The command that wrote an adapter whose factors no longer are those of the options in its lineage."""


@dataclass
class Lineage:
    """The record beside an adapter, `lineage.json`."""

    base_fingerprint: str
    """`source_fingerprint` of the weights as published, before any quantisation."""
    base_name: str | None
    """Name, path or hub id of the base."""
    method: str = "lora"
    """Key of `METHODS`; HF's file does not tell LoRA-FA from LoRA, and has no word for some methods."""
    quantization: str = "none"
    """Quantisation of the base while the adapter was trained."""
    precision: str | None = None
    """Precision that the run computed in, such as bf16-true; null where a folder does not say."""
    packing_difference: float | None = None
    """Difference of a packed sample's logits to those it has alone, as a share of the largest, on the machine of the
    run; null where nothing was packed."""
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved config of the run, plain values only."""
    data_fingerprint: str | None = None
    """Fingerprint of the training rows."""
    versions: dict[str, str] = field(default_factory=installed_versions)
    """Package versions."""
    adapter_sha256: str | None = None
    """Checksum of the weight file; set when it is saved, compared when it is loaded."""
    created_by: str = "lightning-peft train"
    """The command that wrote the adapter."""
    commands: list[str] = field(default_factory=list)
    """The commands that the run was started and gone on with, as they were typed; empty for a run from Python."""
    objective: str = "sft"
    """Key of `OBJECTIVES` that the adapter was trained for."""
    parents: list[dict[str, Any]] = field(default_factory=list)
    """The adapters that `convert` made this one of: name, method, rank, weight and adapter_sha256 of each."""


def write_lineage(lineage: Lineage, folder: Path) -> None:
    (folder / FILE_NAME).write_text(
        json.dumps(asdict(lineage), indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def read_lineage(folder: Path) -> Lineage | None:
    """Return the lineage of an adapter folder; None if it has none, as folders of HF PEFT do. Raises LineageError."""
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LineageError(f"{path}: not JSON ({error}); delete it to load the adapter without its lineage") from error
    known = {f.name for f in fields(Lineage)}
    missing = {"base_fingerprint", "base_name"} - (values.keys() if isinstance(values, dict) else set())
    if missing:
        raise LineageError(f"{path}: lacks {', '.join(sorted(missing))}; delete it to load without lineage")
    for name, kind in KINDS.items():
        if name in values and not isinstance(values[name], kind):
            raise LineageError(f"{path}: {name}={values[name]!r} is of another type; delete it to load without lineage")
    return Lineage(**{key: value for key, value in values.items() if key in known})


def check_lineage(
    folder: Path, base_fingerprint: str, quantization: str = "none", base_name: str | None = None
) -> Lineage | None:
    """Raise LineageError if the adapter was trained on another base than the one fingerprinted.

    Another quantisation of the same base, and a folder with no lineage, are logged and accepted.
    """
    lineage = read_lineage(folder)
    if lineage is None:
        logger.info("%s has no %s: cannot tell whether it was trained on this base", folder, FILE_NAME)
        return None
    if lineage.base_fingerprint != base_fingerprint:
        raise LineageError(
            f"{folder}: this adapter was trained on {lineage.base_name} (weights {lineage.base_fingerprint[:12]}), "
            f"the model loaded is {base_name or 'another'} (weights {base_fingerprint[:12]}): load its own base"
        )
    if lineage.quantization != quantization:
        logger.info(
            "%s was trained on a base with quantization.kind=%s, this one has %s: outputs differ slightly",
            folder,
            lineage.quantization,
            quantization,
        )
    return lineage


def check_one_base(folders: Sequence[tuple[str, Path]], purpose: str) -> None:
    """Raise LineageError where adapters, each by the words that name it, were trained on several bases.

    A folder without a lineage is taken as it is; `purpose` is what they are wanted for, as combined.
    """
    known = [(words, lineage) for words, folder in folders if (lineage := read_lineage(folder)) is not None]
    for words, lineage in known[1:]:
        first, of_first = known[0]
        if lineage.base_fingerprint != of_first.base_fingerprint:
            raise LineageError(
                f"{words}: was trained on {lineage.base_name} (weights {lineage.base_fingerprint[:12]}), and "
                f"{first} on {of_first.base_name} (weights {of_first.base_fingerprint[:12]}); only adapters of one "
                f"base are {purpose}"
            )
