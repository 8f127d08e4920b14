"""Adapter folders in the format of HF PEFT, both ways."""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightning_peft.adapters.base import AdapterConfig, LowRank
from lightning_peft.adapters.former_names import present_name
from lightning_peft.adapters.inject import SHARED, adapters
from lightning_peft.adapters.merge import Given
from lightning_peft.adapters.method import PeftSpelling
from lightning_peft.adapters.registry import METHODS
from lightning_peft.checkpoint.atomic import atomic_folder
from lightning_peft.checkpoint.lineage import Lineage, read_lineage, write_lineage
from lightning_peft.checkpoint.peft_base import BaseChangeError, apply_given, given_by, given_tensors
from lightning_peft.checkpoint.peft_experts import from_peft, matrix_shapes, to_peft
from lightning_peft.checkpoint.peft_methods import REWRITES_BASE, spelling
from lightning_peft.checkpoint.peft_parameters import layers_from_peft
from lightning_peft.checkpoint.peft_words import (
    CONFIG_NAME,
    PREFIX,
    AdapterFileError,
    Words,
    layer_shapes,
    method_of,
    read_config,
    read_words,
    stored_scaling,
    write_words,
)
from lightning_peft.checkpoint.resume import assign, check_names_and_shapes, gathered
from lightning_peft.checkpoint.safetensors_bytes import tensors_of
from lightning_peft.quantization.weights import is_quantized

logger = logging.getLogger(__name__)

WEIGHTS_NAME = "adapter_model.safetensors"
SHARED_PREFIX = "base_model."
NAMED_DEFAULT = re.compile(r"(\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))\.default(?=\.|$)")
"""PEFT's name of an adapter unless it is told otherwise, which PEFT takes out of the names that it saves."""


def save_adapter(
    model: nn.Module,
    config: AdapterConfig,
    folder: Path,
    base_model_name: str | None = None,
    lineage: Lineage | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write the adapters of `model`, and the modules trained in full, as a folder that HF PEFT loads.

    `tokenizer` goes with the folder where it has tokens that the base's has not. Layers whose initialisation rewrote
    the base become a LoRA of twice the rank on the untouched one. `beside` is called with the folder before that takes
    its place, and may write what else goes along. `folder` is replaced in one step; SaveError leaves it as it was. With
    several ranks every one must call this, as sharded tensors are gathered; rank zero writes.
    """
    if METHODS[config.method].trains_all:
        raise ValueError(f"{folder}: method {config.method} has no adapter to save, only a whole model")
    row = spelling(config.method)
    given = {PREFIX + name: tensor for name, tensor in given_tensors(model).items()}
    tensors = gathered(file_tensors(model) | given)
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    tensors = _published(model, _separate(tensors))
    words = write_words(model, config, tensors, base_model_name)
    tensors = to_peft(model, tensors, PREFIX)
    if not row.in_peft:
        logger.info("%s: HF PEFT has no method %s; lightning-peft reads this folder", folder, config.method)
    with atomic_folder(Path(folder)) as partial:
        (partial / CONFIG_NAME).write_text(json.dumps(words, indent=2, sort_keys=True) + "\n")
        if row.shared_file:
            shared = {name: tensors.pop(name) for name in list(tensors) if not name.startswith(PREFIX)}
            save_file(shared, partial / row.shared_file, metadata={"format": "pt"})
        save_file(tensors, partial / WEIGHTS_NAME, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if lineage is not None:
            write_lineage(replace(lineage, adapter_sha256=file_sha256(partial / WEIGHTS_NAME)), partial)
        if beside is not None:
            beside(partial)


def load_adapter(model: nn.Module, folder: str | Path, may_lack: Iterable[str] = ()) -> None:
    """Copy the tensors of an adapter folder into a model that `inject_adapters` has prepared for them.

    Embeddings and biases of the base that the folder carries are replaced too. Trained tensors of `may_lack` that the
    folder has not keep their values. Raises AdapterFileError for a missing or damaged file, for one whose names or
    shapes are not those of the model, and for numbers that are not finite.
    """
    folder = Path(folder)
    words = read_words(folder)
    _check_base(model, words, folder)
    expected = file_tensors(model)
    rename = present_name(model)
    got = {
        name if name in expected or not name.startswith(PREFIX) else PREFIX + rename(name.removeprefix(PREFIX)): tensor
        for name, tensor in from_peft(
            model, layers_from_peft(model, words, _read_tensors(folder), PREFIX), PREFIX
        ).items()
        if tensor.numel() or name in expected
    }
    own = {name.removeprefix(PREFIX): tensor for name, tensor in got.items() if name.startswith(PREFIX)}
    try:
        changes = given_by(model, words, own, [name.removeprefix(PREFIX) for name in expected])
    except BaseChangeError as error:
        raise AdapterFileError(f"{folder}: {error}") from error
    got = {PREFIX + name: tensor for name, tensor in own.items()} | {
        name: tensor for name, tensor in got.items() if not name.startswith(PREFIX)
    }
    for name in may_lack:
        if PREFIX + name in expected and PREFIX + name not in got:
            logger.info("%s has no %s: it starts anew", folder, name)
            del expected[PREFIX + name]
    of_base = _base_tensors(model, words, got.keys() - expected.keys())
    expected |= of_base
    check_names_and_shapes(str(folder / WEIGHTS_NAME), expected, got, AdapterFileError)
    for name, tensor in got.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise AdapterFileError(f"{folder}: {name} has numbers that are not finite; the adapter has no answers")
    _warn_of_other_scaling(model, words, got, folder)
    _check_shared(model, folder, expected, got)
    for name, target in expected.items():
        if name not in of_base:
            assign(target, got[name])
    apply_given(model, _whole(got, of_base) | changes)


def _whole(got: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Given]:
    """Return weights of the base that a file has whole as changes, by the model's names."""

    def value_of(tensor: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda weight: tensor.to(weight)

    return {name.removeprefix(PREFIX): Given(value_of(got[name])) for name in names}


def adapter_config_from_peft(folder: str | Path) -> AdapterConfig:
    """Return the config with which `inject_adapters` makes a place for every tensor of an adapter folder, ours or HF's.

    Layers and ranks are read off the tensors, so that any spelling of HF's patterns will do. Raises AdapterFileError
    for features we do not have.
    """
    folder = Path(folder)
    return read_config(folder, read_words(folder), _read_shapes(folder))


def changes_base(folder: Path) -> bool:
    """Return whether a folder carries more than adapters: trained modules, biases, embeddings, or a rewritten base.

    Disabling the adapters of a model that has loaded such a folder does not give the base back.
    """
    return bool(tensors_beside(folder)) or read_words(folder).get("init_lora_weights") in REWRITES_BASE


def tensors_beside(folder: Path) -> list[str]:
    """Return the names of the base's own tensors that a folder carries: trained modules, biases, embeddings."""
    return _beside(_read_shapes(folder), spelling(method_of(folder, read_words(folder))))


def _beside(names: Iterable[str], row: PeftSpelling) -> list[str]:
    endings = tuple(f".{ending}" for ending in row.tensors)
    found = [name for name in names if name.startswith(PREFIX) and not name.endswith(endings)]
    return [name.removeprefix(PREFIX) for name in found] if endings else []


def read_low_rank(folder: Path) -> dict[str, LowRank]:
    """Return the low-rank change of every layer in an adapter folder, on the host, without a model.

    Raises AdapterFileError for a damaged file, for a method whose file is no pair of factors a layer, and for a folder
    that carries more than them.
    """
    words = read_words(folder)
    method = method_of(folder, words)
    row = spelling(method)
    if row.peft_type != "LORA" or "lora_magnitude_vector" in row.tensors:
        raise AdapterFileError(
            f"{folder}: method {method} is no file of low-rank pairs; `export format=plain` makes one of AdaLoRA and "
            "VeRA, another is served alone"
        )
    if parameters := words.get("target_parameters"):
        raise AdapterFileError(
            f"{folder}: adapts parameters, as {parameters[0]}, whose layout the model alone tells: serve it alone"
        )
    if words.get("init_lora_weights") in REWRITES_BASE:
        raise AdapterFileError(f"{folder}: is for a base that its start rewrote; `export format=plain` makes it plain")
    tensors = _read_tensors(folder)  # once: a server waits for this
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if beside := _beside(shapes, row):
        raise AdapterFileError(
            f"{folder}: trains {beside[0]} of the base as well, so it cannot share one: serve it alone"
        )
    for name, shape in shapes.items():
        if len(shape) != 2 and name.endswith(tuple(row.tensors)):
            raise AdapterFileError(f"{folder}: {name} is of shape {shape}, and no matrix")
    read_config(folder, words, shapes)  # refuses what we do not have
    found = {}
    for name, shape in layer_shapes(shapes, row).items():
        A, B = (tensors.get(f"{PREFIX}{name}.lora_{part}.weight") for part in "AB")
        if A is None or B is None:
            raise AdapterFileError(f"{folder}: {name} is an embedding, whose adapter is served alone")
        if A.shape[0] != B.shape[1]:  # len() of a tensor is slow
            raise AdapterFileError(f"{folder}: {name} has A of rank {len(A)} and B of {B.shape[1]}, which are no pair")
        found[name] = LowRank(A.float(), B.float(), stored_scaling(words, row, name, shape[0]))
    return found


def file_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the weight file by HF's names, not copied; both names of a trained tied weight."""
    found: dict[str, Tensor] = {}
    for layer_name, layer in adapters(model):
        for name, parameter in layer.named_parameters():
            if not name.startswith("base_layer."):
                found[f"{PREFIX}{layer_name}.{name}"] = parameter
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and not name.startswith(f"{SHARED}."):
            found[PREFIX + name] = parameter
    shared = getattr(model, SHARED, None)
    if shared is not None:
        found |= {SHARED_PREFIX + name: tensor for name, tensor in shared.state_dict(keep_vars=True).items()}
    return found


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, no two of which share memory."""
    result: dict[str, Tensor] = {}
    pointers: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.cpu().contiguous()
        result[name] = whole.clone() if whole.data_ptr() in pointers else whole
        pointers.add(whole.data_ptr())
    return result


def _published(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as each layer publishes its own."""
    if any(layer.rewrote_base and is_quantized(layer.base_layer) for _, layer in adapters(model)):
        logger.warning(
            "adapter.init rewrote a quantised base: elsewhere the saved adapter is off by the rounding of the rest, "
            "least on the dense base"
        )
    found = dict(tensors)
    for name, layer in adapters(model):
        prefix = f"{PREFIX}{name}."
        own = {key.removeprefix(prefix): found.pop(key) for key in tensors if key.startswith(prefix)}
        found |= {prefix + key: tensor for key, tensor in layer.published(own).items()}
    return found


def _check_base(model: nn.Module, words: Words, folder: Path) -> None:
    """Raise AdapterFileError unless an initialisation rewrote both the file's base and the model's, or neither."""
    rewritten = any(layer.rewrote_base for _, layer in adapters(model))
    if rewritten != (words.get("init_lora_weights") in REWRITES_BASE):
        raise AdapterFileError(
            f"{folder}: is for {'an untouched' if rewritten else 'a rewritten'} base, and this model's is not: "
            f"inject with adapter.init={'kaiming' if rewritten else words['init_lora_weights']}"
        )


def _files(folder: Path) -> list[str]:
    """Return the names of the files that hold the tensors of an adapter folder."""
    shared = spelling(method_of(folder, read_words(folder))).shared_file
    return [WEIGHTS_NAME, *([shared] if shared else [])]


def _existing(folder: Path, name: str) -> Path:
    """Return the path of a file of an adapter folder. Raises AdapterFileError."""
    path = folder / name
    if not path.is_file():
        pickled = " (adapter_model.bin is a pickle, which may run code: convert it)"
        hint = pickled if (folder / "adapter_model.bin").is_file() else ""
        raise AdapterFileError(f"{folder}: has no {WEIGHTS_NAME}{hint}")
    return path


def _damaged(path: Path, error: Exception) -> AdapterFileError:
    return AdapterFileError(f"{path}: truncated or damaged ({error})")


def _open(folder: Path, name: str = WEIGHTS_NAME) -> Any:
    path = _existing(folder, name)
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _plain_name(name: str) -> str:
    """Return a tensor's name without the adapter's own, which a saved state dict of a PEFT model has in it."""
    return NAMED_DEFAULT.sub(r"\1", name) if ".default" in name else name


def _read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for part in _files(folder):
        with _open(folder, part) as file:
            shapes |= {_plain_name(name): tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    return shapes


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    lineage = read_lineage(folder)
    tensors: dict[str, Tensor] = {}
    for part in _files(folder):
        try:
            content = _read(_existing(folder, part))
            found = tensors_of(content)
        except (SafetensorError, OSError) as error:
            raise _damaged(folder / part, error) from error
        tensors |= {_plain_name(name): tensor for name, tensor in found.items()}
        expected = lineage.adapter_sha256 if lineage is not None and part == WEIGHTS_NAME else None
        if expected is not None and expected != hashlib.sha256(content).hexdigest():
            raise AdapterFileError(
                f"{folder / part}: damaged, it is not the file that lineage.json describes; "
                "if it was changed on purpose, delete lineage.json"
            )
    return dict(sorted(tensors.items()))  # the library gives names in another order in every process


def _read(path: Path) -> bytearray:
    content = bytearray(path.stat().st_size)
    with path.open("rb") as file:
        del content[file.readinto(content) :]  # type: ignore[attr-defined]
    return content


def adapter_sha256(folder: Path) -> str:
    """Return the checksum of all that makes an adapter: its config, and the files of its tensors.

    Raises AdapterFileError where one is missing.
    """
    sums = [file_sha256(_existing(folder, name)) for name in (CONFIG_NAME, *_files(folder))]
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _base_tensors(model: nn.Module, words: Words, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the frozen tensors of the base that HF stores with an adapter.

    These tensors are resized or adapted embeddings, and trained biases.
    """
    ends = {id(getattr(model, f"get_{end}_embeddings")()) for end in ("input", "output")}
    embeddings = {name for name, module in model.named_modules() if id(module) in ends}
    endings = tuple(f"{name}{inner}.weight" for name in embeddings for inner in ("", ".base_layer"))
    if words.get("bias", "none") != "none":
        endings = (*endings, ".bias")
    own = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, Tensor] = {
        name: own[name.removeprefix(PREFIX)]
        for name in names
        if name.removeprefix(PREFIX) in own and name.endswith(endings)
    }
    return found


def _check_shared(model: nn.Module, folder: Path, expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> None:
    """Raise AdapterFileError where a file has different values for one tensor of the model that has two names."""
    first: dict[int, str] = {}
    for name, target in expected.items():
        other = first.setdefault(id(target), name)
        if other != name and not torch.equal(got[other], got[name]):
            is_adapters = any(name.startswith(f"{PREFIX}{layer}.lora_") for layer, _ in adapters(model))
            raise AdapterFileError(
                f"{folder / WEIGHTS_NAME}: {other} and {name} differ, and are one tensor in this model: load it with "
                f"adapter.{'share=layer' if is_adapters else 'untie_embeddings=true'}"
            )


def _warn_of_other_scaling(model: nn.Module, words: Words, got: Mapping[str, Tensor], folder: Path) -> None:
    row = spelling(method_of(folder, words))
    if row.alpha_word is None:
        return
    layers = dict(adapters(model))
    for name, shape in layer_shapes(matrix_shapes(got), row).items():
        here: Any = layers[name].scaling
        stored = stored_scaling(words, row, name, shape[0])
        if abs(stored - here) > 1e-6 * stored:
            logger.warning("%s: %s was scaled by %g, here it is by %g", folder, name, stored, here)
            return
