"""Checks of an adapter's folder before an engine loads it: its name, its base, its files.

vLLM's interpreter imports this file behind `vllm_middleware`, with nothing else of ours beside the two: the standard
library has to do. `serve` checks adapters by the same functions before it starts vLLM.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""Names that a model may have: a name is checked before it becomes a path."""
KINDS_OF_PARTS = ("text", "input", "output", "image", "audio", "video", "tool", "thinking", "refusal")
"""First words of the types of message parts: vLLM answers a request to the base with such a part as an adapter of that
name, where there is one."""
MOST_LISTED = 20
"""Names in a line that says which there are."""
CONFIG, WEIGHTS, LINEAGE, LAYOUT = (
    "adapter_config.json", "adapter_model.safetensors", "lineage.json", "prompt_layout.json",
)  # fmt: skip
FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
KINDS_OF_LAYOUT = {
    "kind": str, "system_prompt": str, "template": str, "template_options": dict, "tools": list, "stop_token_ids": list,
}  # fmt: skip
KINDS_OF_LINEAGE = {"base_fingerprint": str, "base_name": str, "precision": str, "quantization": str, "config": dict}
KINDS_OF_MODEL = {"rope_scaling": dict, "new_tokens": list}
EXPONENTS = {"F64": (8, 0x7F, 0xF0), "F32": (4, 0x7F, 0x80), "BF16": (2, 0x7F, 0x80), "F16": (2, 0x7C, 0x00)}
"""dtype in a safetensors file -> bytes of a number, and the bits of its last byte and of the one before that are all
set where it is not finite."""


@dataclass
class Settings:
    """The settings of the base and its adapters, as `serve` writes them."""

    base_name: str
    fingerprint: str  # it is that of the base's weights, as in lineage.json
    layers: dict[str, list[int]]  # layer of the base -> its inputs and outputs
    rank: int  # it is the largest that vLLM has place for
    base_layout: dict[str, Any]  # prompts of the base, as in prompt_layout.json
    adapters: dict[str, str]  # name -> folder, of those that vLLM loads when it starts
    adapter_dir: str | None
    allow_load: bool
    most_requests: int  # so many may run and wait; more get status 429
    reads_patterns: bool  # whether this vLLM scales each layer by its own rank and alpha
    dtype: str  # it is the one that the base computes in
    dtypes: dict[str, str]  # precision of a training -> dtype that it computed in
    plain_starts: list[str]  # values of init_lora_weights that leave the base as it is
    repeated_starts: list[str]  # values of it that HF PEFT repeats on the base when it loads
    switched_off: dict[str, list[Any]]  # word of HF PEFT's for what is not read here -> values at which it is off


FolderVersion = tuple[tuple[int, int, int] | None, ...]  # inode, size and time of change of each file; None without it


def folder_version(folder: Path) -> FolderVersion:
    """Return which files an adapter folder has now."""
    found: list[tuple[int, int, int] | None] = []
    for name in (CONFIG, WEIGHTS, LINEAGE, LAYOUT):
        try:
            status = os.stat(folder / name)
        except OSError:
            found.append(None)
        else:
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)


def adapters_in(directory: str | Path | None) -> list[str]:
    """Return the names of the adapters in a folder, in order; none while the folder is away."""
    try:
        found = [] if directory is None else [path for path in Path(directory).iterdir() if NAME.fullmatch(path.name)]
    except OSError:
        return []
    return sorted(p.name for p in found if (p / CONFIG).is_file() or (p / "adapter" / CONFIG).is_file())


def listed(names: Sequence[str]) -> str:
    """Return names in a line, the first ones of many."""
    more = f" and {len(names) - MOST_LISTED:,} more" if len(names) > MOST_LISTED else ""
    return ", ".join(names[:MOST_LISTED]) + more


def is_there(version: FolderVersion) -> bool:
    """Return whether the files of an adapter are there, its config and its weights."""
    return None not in version[:2]


def check_name(name: str, base_name: str) -> None:
    """Raise ValueError for what an adapter cannot be called."""
    if name == base_name:
        raise ValueError(f"{name}: is the base's name; call the adapter otherwise")
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r}: letters, digits, dots, dashes and underscores only")
    if name in KINDS_OF_PARTS:
        raise ValueError(f"{name}: is a kind of message part, by which vLLM chooses adapters; call it otherwise")


def check_adapter(folder: Path, settings: Settings) -> int:
    """Return the rank of an adapter. Raises ValueError for one that vLLM would refuse, or answer as the base with."""
    words, lineage = read_json(folder / CONFIG), read_lineage(folder)
    if words is None:
        raise ValueError(f"{folder}: not an adapter folder, {CONFIG} is missing")
    check_words(folder, words, settings)
    if lineage is not None:
        if (trained := lineage.get("base_fingerprint")) != settings.fingerprint:
            raise ValueError(
                f"{folder}: this adapter was trained on {lineage.get('base_name')} (weights {str(trained)[:12]}), the "
                f"model loaded is {settings.base_name} (weights {settings.fingerprint[:12]}): load its own base"
            )
        check_same_model(str(folder), lineage.get("config"))
    content = read_weights(folder / WEIGHTS)
    tensors = tensors_in(folder / WEIGHTS, content)
    checksum = None if lineage is None else lineage.get("adapter_sha256")
    if checksum is not None and hashlib.sha256(content).hexdigest() != checksum:
        raise ValueError(f"{folder / WEIGHTS}: is not the file that lineage.json was written for; it may be damaged")
    if not isinstance(own := words.get("r"), int):
        raise ValueError(f"{folder}: r={own} in {CONFIG} is no rank")
    rank = max([own, *(check_factor(folder, key, tensor, settings) for key, tensor in tensors.items())])
    for key, tensor in tensors.items():
        if not is_finite(content[tensor.start : tensor.end], tensor.dtype):
            raise ValueError(f"{folder}: {key} has numbers that are not finite; the adapter has no answers")
    if rank > settings.rank:
        raise ValueError(
            f"{folder}: is of rank {rank}, vLLM has place for {settings.rank}; start with serve.max_rank={rank}"
        )
    return rank


def check_words(folder: Path, words: Mapping[str, Any], settings: Settings) -> None:
    """Raise ValueError for a folder of HF PEFT's whose factors alone are not the adapter."""
    if words.get("peft_type") != "LORA":
        raise ValueError(
            f"{folder}: peft_type {words.get('peft_type')} is no LoRA; `lightning-peft export format=plain` makes one "
            "of AdaLoRA and VeRA, and serve.engine=embedded serves any other alone"
        )
    for word, off in settings.switched_off.items():
        if word in words and words[word] not in off:
            raise ValueError(f"{folder}: uses {word}={words[word]!r}, a feature of HF PEFT not supported here")
    start = str(words.get("init_lora_weights", True)).lower()
    if start in settings.repeated_starts:
        raise ValueError(
            f"{folder}: init_lora_weights={start} rewrote the base, which vLLM does not repeat; "
            "`lightning-peft export format=plain` makes it plain"
        )
    if start not in settings.plain_starts:
        raise ValueError(
            f"{folder}: init_lora_weights={start!r} changed the base weights, so the file alone is not enough; save it "
            "in HF PEFT with path_initial_model_for_weight_conversion"
        )
    if not settings.reads_patterns and (words.get("rank_pattern") or words.get("alpha_pattern")):
        raise ValueError(
            f"{folder}: has ranks or alphas of its own for some layers, which this vLLM scales as all others; "
            "`lightning-peft export format=plain` makes it plain"
        )


def check_same_model(
    words: str,
    trained: Any,
    rope_scaling: Mapping[str, Any] | None = None,
    new_tokens: Sequence[str] = (),
) -> None:
    """Raise ValueError for an adapter that was trained on other positions, or with other tokens, than a base has.

    `words` name the adapter as typed, `trained` is the config in its lineage. The weights are the lineage's to compare.
    """
    model, remedy = trained.get("model") if isinstance(trained, dict) else None, "give it a server of its own"
    if not isinstance(model, dict) or not model:
        return
    check_kinds(f"{words}: no config of a model in its {LINEAGE}", model, KINDS_OF_MODEL)
    scalings = [
        {key: value for key, value in (each or {}).items() if value is not None}
        for each in (model.get("rope_scaling"), rope_scaling)
    ]
    if scalings[0] != scalings[1]:
        theirs, ours = (
            " ".join(f"model.rope_scaling.{key}={value}" for key, value in each.items()) or "none" for each in scalings
        )
        raise ValueError(f"{words}: was trained with the scaling {theirs}, the base has {ours}; {remedy}")
    if missing := [str(token) for token in model.get("new_tokens") or [] if token not in new_tokens]:
        raise ValueError(f"{words}: knows tokens that the base served has not, {', '.join(missing[:5])}; {remedy}")


def other_precision(folder: Path, trained: str | None, dtype: str, dtypes: Mapping[str, str]) -> str | None:
    """Return a line on an adapter that was trained in another dtype than it is served in; None for any other."""
    if trained is None or dtypes.get(trained, dtype) == dtype:
        return None
    return f"{folder}: was trained in {trained} and is served in {dtype}, so its answers are not those of `generate`"


def remarks(folder: Path, settings: Settings) -> list[str]:
    """Return a line for each way in which vLLM computes an adapter otherwise than it was trained."""
    lineage = read_lineage(folder) or {}
    found = [other_precision(folder, lineage.get("precision"), settings.dtype, settings.dtypes)]
    if (kind := lineage.get("quantization", "none")) != "none":
        found.append(f"{folder}: was trained on a base with quantization.kind={kind}, vLLM has it dense")
    return [line for line in found if line is not None]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place in a safetensors file."""

    dtype: str
    shape: list[int]
    start: int
    end: int


def check_factor(folder: Path, key: str, tensor: StoredTensor, settings: Settings) -> int:
    """Return the rank of a tensor. Raises ValueError for one that is no factor of a layer of the base."""
    if (found := FACTOR.fullmatch(key)) is None:
        raise ValueError(
            f"{folder}: {key} is no factor of a LoRA, and vLLM takes nothing else; serve.engine=embedded serves it "
            "alone"
        )
    (layer, factor), shape = found.groups(), tensor.shape
    if layer not in settings.layers:
        raise ValueError(f"{folder}: {layer} is no layer of {settings.base_name}")
    inputs, outputs = settings.layers[layer]
    if len(shape) != 2 or shape[1 if factor == "A" else 0] != (inputs if factor == "A" else outputs):
        raise ValueError(f"{folder}: {key} is of shape {shape}; the layer has {inputs} inputs and {outputs} outputs")
    return shape[0 if factor == "A" else 1]


def read_weights(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; weights are read from safetensors files alone")
    return path.read_bytes()


def tensors_in(path: Path, content: bytes) -> dict[str, StoredTensor]:
    """Return the places of tensors by name. Raises ValueError for bytes that are no safetensors file."""
    start = 8 + int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8:start] if start <= len(content) else b"")
        header.pop("__metadata__", None)
        found = {
            name: StoredTensor(entry["dtype"], list(entry["shape"]), *(start + at for at in entry["data_offsets"]))
            for name, entry in header.items()
        }
        end = max(tensor.end for tensor in found.values())
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: is no safetensors file, or a damaged one") from error
    if len(content) != end:
        raise ValueError(f"{path}: is damaged: {len(content)} bytes, and {end} would be whole")
    return found


def is_finite(numbers: bytes, dtype: str) -> bool:
    """Return whether all numbers are finite, of a dtype that is in `EXPONENTS`; others are left to vLLM."""
    if dtype not in EXPONENTS:
        return True
    size, *bits = EXPONENTS[dtype]
    last, before = (
        # A byte a number, 1 where all these bits are set: whole planes are compared at once.
        int.from_bytes(numbers[size - 1 - at :: size].translate(SETS[mask]), "little")
        for at, mask in enumerate(bits)
    )
    return not last & before


SETS = {mask: bytes(byte & mask == mask for byte in range(256)) for _, *bits in EXPONENTS.values() for mask in bits}
"""Bits -> for each byte whether it has them all."""


def read_layout(folder: Path) -> dict[str, Any] | None:
    """Return the prompts of an adapter, None where its folder does not say. Raises ValueError."""
    layout = read_json(folder / LAYOUT)
    check_kinds(f"{folder / LAYOUT}: not a prompt layout", layout or {}, KINDS_OF_LAYOUT)
    return layout


def read_lineage(folder: Path) -> dict[str, Any] | None:
    """Return the origin of an adapter, None where its folder does not say. Raises ValueError."""
    lineage = read_json(folder / LINEAGE)
    check_kinds(f"{folder / LINEAGE}: not a lineage", lineage or {}, KINDS_OF_LINEAGE)
    return lineage


def check_kinds(words: str, found: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    """Raise ValueError, which begins with `words`, for a value of another type than its key has."""
    for key, kind in kinds.items():
        if found.get(key) is not None and not isinstance(found[key], kind):
            raise ValueError(f"{words} ({key}={found[key]!r} is of another type)")


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a file, None where there is no file. Raises ValueError for a file of another kind."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: is no JSON object")
    return found
