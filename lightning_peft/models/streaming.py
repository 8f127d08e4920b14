"""Weights read one tensor at a time into a model that has none, quantised on the way where asked.

Host memory stays under the filled part of the model plus its largest tensor: safetensors and GGUF files are mapped, and
nothing dense outlives its own step. The transformer blocks come last, one after another, so that each can be sharded
before the next is read.
"""

import json
import logging
import mmap
import re
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from lightning_peft.models.blocks import block_names
from lightning_peft.models.multimodal import names_left, remember_files
from lightning_peft.quantization.config import QuantizationConfig
from lightning_peft.quantization.convert import load_weight, prepare_quantized
from lightning_peft.quantization.linear import CodedWeight, QuantizedLinear

logger = logging.getLogger(__name__)


class WeightSource(Protocol):
    """Named tensors of a checkpoint, read when asked for."""

    def names(self) -> list[str]: ...

    def read(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """The tensor in its own memory, in `dtype` when given and floating, else as stored."""
        ...


class SafetensorsSource:
    """The tensors of one or more safetensors files, each from the one that `index` names where it names one.

    Raises ValueError for a file that is none, and for a tensor that two files hold and the index does not name.
    """

    def __init__(self, paths: list[Path], index: Mapping[str, str] | None = None):
        self.files: dict[str, Any] = {}
        self.paths: dict[str, Path] = {}
        """The file that holds each tensor."""
        for path in paths:
            try:
                file = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"model.path={path}: truncated or corrupt safetensors file ({error})") from error
            for name in file.keys():
                place = (index or {}).get(name)
                if place is None and name in self.paths:
                    raise ValueError(
                        f"model.path={path}: holds {name}, and so does {self.paths[name].name}: delete one"
                    )
                if place in (None, path.name):
                    self.files[name], self.paths[name] = file, path
        if lacking := sorted((index or {}).keys() - self.files.keys()):
            raise ValueError(f"model.path={paths[0].parent}: its index names {lacking[0]}, which no file holds")

    def names(self) -> list[str]:
        return list(self.files)

    def read(self, name: str, dtype: torch.dtype | None) -> Tensor:
        mapped = self.files[name].get_tensor(name)
        # A copy: the mapped pages would change under us if the file did.
        return mapped.to(dtype if dtype is not None and mapped.is_floating_point() else mapped.dtype, copy=True)


def map_file(path: Path) -> memoryview:
    """The file's bytes, read from disk where they are looked at."""
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def stored_tensors(path: Path) -> Iterator[tuple[str, list[int], memoryview]]:
    """Name, shape and mapped bytes of every tensor in a safetensors file, by its header."""
    for name, entry, data in _entries(path):
        yield name, entry["shape"], data


def stored_kinds(path: Path) -> set[str]:
    """Safetensors' names of the dtypes in a file."""
    return {entry["dtype"] for _, entry, _ in _entries(path)}


def _entries(path: Path) -> Iterator[tuple[str, dict[str, Any], memoryview]]:
    data = map_file(path)
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(bytes(data[8:start]))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                yield name, entry, data[start + begin : start + end]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"model.path={path}: truncated or corrupt safetensors file ({error})") from error


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside have parameters on the meta device and real buffers, such as rotary frequencies."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        original(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


@torch.no_grad()
def stream_weights(
    model: PreTrainedModel,
    source: WeightSource,
    dtype: torch.dtype | None,
    device: torch.device,
    quantization: QuantizationConfig | None = None,
) -> Iterator[str]:
    """Fill a model built under `parameters_on_meta`, in `dtype` on `device`, part by part; without a dtype, as stored.

    Yields "" once all outside the transformer blocks is filled and tied weights are tied, then the name of each block
    once it is filled; a part is read when it is asked for. Renames and fused parameters follow transformers' conversion
    rules; layers that bitsandbytes has quantised in the checkpoint keep their codes. Raises ValueError where the
    checkpoint lacks a weight or has one of another shape.
    """
    targets = {name: tensor.shape for name, tensor in model.state_dict().items()}
    missing = set(targets)
    codes = bitsandbytes_layers(source)
    plan = plan_loading(model, source, set(targets), skip=set().union(*codes.values()))
    direct, fused, unexpected = plan.direct, plan.fused, plan.unexpected
    if plan.left:
        assert isinstance(source, SafetensorsSource), "others hold the text alone"
        remember_files(model, {key: source.paths[key] for key in plan.left})
    known = model._keys_to_ignore_on_load_unexpected or []
    if unused := [key for key in unexpected if not any(re.search(p, key) for p in [*known, r"rotary_emb\.inv_freq"])]:
        logger.warning("%d weights of the checkpoint are not in the model: %s", len(unused), _some(unused))
    if codes:
        check_quantization(codes, quantization)
        prepare_bitsandbytes_layers(model, source, codes)
    elif quantization is not None and quantization.is_on:
        prepare_quantized(model, quantization)
    fp32_names = fp32_pattern(model, dtype)
    optional = model._keys_to_ignore_on_load_missing or []

    def dtype_of(name: str) -> torch.dtype | None:
        return torch.float32 if fp32_names is not None and fp32_names.search(name) else dtype

    def place(name: str, tensor: Tensor) -> None:
        if tensor.shape != targets[name]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} in the file and {tuple(targets[name])} in the model: "
                "its configuration belongs to other weights"
            )
        put_tensor(model, name, tensor.to(device))
        missing.discard(name)

    def read(name: str, key: str) -> None:
        place(name, source.read(key, dtype_of(name)))

    def convert(converter: Converter) -> None:
        for name, tensor in converter():
            place(name, tensor.to(dtype_of(name) or tensor.dtype) if tensor.is_floating_point() else tensor)

    def read_codes(name: str, keys: set[str]) -> None:
        assert dtype is not None, "codes are computed with in some dtype"
        put_bitsandbytes_layer(model, name, {key: source.read(key, None) for key in keys}, dtype, device)
        missing.difference_update({f"{name}.weight", *keys})

    steps: dict[str, list[Callable[[], None]]] = {part: [] for part in ("", *block_names(model))}
    for name, key in direct.items():
        steps[part_of(name, steps)].append(partial(read, name, key))
    for name, converter in fused.items():
        steps[part_of(name, steps)].append(partial(convert, converter))
    for name, keys in codes.items():
        steps[part_of(name, steps)].append(partial(read_codes, name, keys))

    for part in steps:
        for step in steps[part]:
            step()
        steps[part].clear()  # a converter holds what it has made
        if not part:
            model.tie_weights(missing_keys=missing, recompute_mapping=False)
            for buffer_name, buffer in model.named_buffers():
                if not buffer.is_meta and buffer.device != device:
                    put_tensor(model, buffer_name, buffer.to(device))
        for name in [name for name in missing if part_of(name, steps) == part]:
            # A block whose weights are another's, as Zamba 2 repeats one; the checkpoint holds them once.
            source_name = model.all_tied_weights_keys.get(name)
            if source_name is not None and source_name in targets and source_name not in missing:
                share_tensor(model, name, source_name)
                missing.discard(name)
        lacking = [name for name in missing if part_of(name, steps) == part]
        if lacking := sorted(name for name in lacking if not any(re.search(pattern, name) for pattern in optional)):
            raise ValueError(f"the checkpoint lacks {len(lacking)} weights of {type(model).__name__}: {_some(lacking)}")
        yield part


def part_of(name: str, parts: Container[str]) -> str:
    """The part that a parameter's name lies in; "" where that is none of them."""
    words = name.split(".")
    return next((part for end in range(1, len(words)) if (part := ".".join(words[:end])) in parts), "")


Converter = Callable[[], Iterator[tuple[str, Tensor]]]
"""Reads the tensors of one conversion rule and yields the parameters made of them, by name."""


class LoadingPlan(NamedTuple):
    """What each key of a checkpoint becomes."""

    direct: dict[str, str]
    """Parameter name: key."""
    fused: dict[str, Converter]
    """The rules that fuse or split tensors, by one of the parameters they make."""
    unexpected: list[str]
    """Keys that have no place."""
    left: list[str]
    """Keys of parts that are left on disk."""


def plan_loading(model: PreTrainedModel, source: WeightSource, targets: set[str], skip: set[str]) -> LoadingPlan:
    """Find the parameters that a checkpoint's keys become, by transformers' conversion rules."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    elsewhere = names_left(model)
    exists = dict.fromkeys(targets | elsewhere, True)
    direct: dict[str, str] = {}
    fused: dict[str, WeightConverter] = {}
    unexpected: list[str] = []
    left: list[str] = []
    # The order of the keys is the order of the experts in a fused parameter.
    for key in sorted(source.names(), key=dot_natural_key):
        if key in skip:
            continue
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, exists)
        if name not in exists and key in exists:
            name, pattern = key, None
        if name in elsewhere:
            left.append(key)
        elif name not in targets:
            unexpected.append(key)
        elif pattern is None:
            direct[name] = key
        else:
            converter = fused.setdefault(name, deepcopy(by_pattern[pattern]))
            # A callable is read when the rule runs.
            converter.add_tensor(name, key, pattern, partial(source.read, key, None))  # type: ignore[arg-type]

    def run(name: str, converter: WeightConverter) -> Iterator[tuple[str, Tensor]]:
        made = converter.convert(name, model=model, config=model.config)
        for target, value in made.items():
            yield target, value[0] if isinstance(value, list) else value

    converted: dict[str, Converter] = {name: partial(run, name, converter) for name, converter in fused.items()}
    return LoadingPlan(direct, converted, unexpected, left)


def put_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make this tensor the parameter or buffer of that name; a 4-bit layer takes its codes."""
    if load_weight(model, name, tensor):
        return
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        trains = module.get_parameter(leaf).requires_grad
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=trains))


def share_tensor(model: nn.Module, name: str, source: str) -> None:
    """Make a parameter the one that `source` names; a 4-bit layer takes a copy of the other's codes."""
    module_name, _, leaf = name.rpartition(".")
    module, other = model.get_submodule(module_name), model.get_submodule(source.rpartition(".")[0])
    other = getattr(other, "base_layer", other)  # a block before this one may be adapted already
    source_leaf = source.rpartition(".")[2]
    layers = (module, other) if leaf == "weight" else (getattr(module, leaf, None), getattr(other, source_leaf, None))
    if isinstance(layers[0], CodedWeight) and isinstance(layers[1], CodedWeight):
        layers[0].load_codes_(layers[1].codes)
    else:
        setattr(module, leaf, other.get_parameter(source.rpartition(".")[2]))


def fp32_pattern(model: PreTrainedModel, dtype: torch.dtype | None) -> re.Pattern[str] | None:
    """Names of the parameters this architecture keeps in fp32, such as routing biases."""
    if dtype is None:
        return None
    names = set(model._keep_in_fp32_modules_strict or ()) if dtype != torch.float32 else set()
    if dtype == torch.float16:
        names |= set(model._keep_in_fp32_modules or ())
    return re.compile("|".join(rf"(^|\.){name}(\.|$)" for name in sorted(names))) if names else None


def bitsandbytes_layers(source: WeightSource) -> dict[str, set[str]]:
    """Layers whose weights the checkpoint holds as bitsandbytes' 4-bit codes, with their keys."""
    layers: dict[str, set[str]] = {}
    for key in source.names():
        name, marker, _ = key.partition(".weight.quant_state.bitsandbytes__")
        if marker:
            layers[name] = set()
    for key in source.names():
        for end in (".weight", ".bias"):
            name, found, rest = key.partition(end)
            if found and name in layers and (not rest or rest.startswith(".")):
                layers[name].add(key)
    return layers


def check_quantization(layers: dict[str, set[str]], quantization: QuantizationConfig | None) -> None:
    """Raise ValueError where the checkpoint's own 4-bit kind is not the one asked for."""
    kinds = {key.rpartition("__")[2] for keys in layers.values() for key in keys if "bitsandbytes__" in key}
    logger.info("%d layers are %s in the checkpoint and stay as they are", len(layers), " and ".join(sorted(kinds)))
    if quantization is not None and quantization.is_on and kinds != {quantization.kind.name}:
        raise ValueError(
            f"quantization.kind={quantization.kind.name}: the checkpoint holds {' and '.join(sorted(kinds))} codes; "
            "use that kind or none"
        )


def prepare_bitsandbytes_layers(model: nn.Module, source: WeightSource, layers: dict[str, set[str]]) -> None:
    """Replace the linear layers the checkpoint holds as codes by 4-bit ones without values."""
    # Imports bitsandbytes, four seconds that only such a checkpoint needs.
    from lightning_peft.quantization.bitsandbytes_format import PACKED, layer_without_codes

    for name, keys in layers.items():
        (packed,) = (key for key in keys if key.startswith(f"{name}.{PACKED}"))
        layer = layer_without_codes(source.read(packed, None))
        layer.bias = model.get_submodule(name).bias  # type: ignore[assignment]
        model.set_submodule(name, layer)


def put_bitsandbytes_layer(
    model: nn.Module, name: str, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device
) -> None:
    """Fill a layer with the codes bitsandbytes stored, computing in `dtype`."""
    from lightning_peft.quantization.bitsandbytes_format import from_bitsandbytes_state  # as slow as above

    stored = from_bitsandbytes_state({key[len(name) + 1 :]: tensor for key, tensor in tensors.items()})
    stored = stored.to(device=device, dtype=dtype)
    layer = model.get_submodule(name)
    assert isinstance(layer, QuantizedLinear)
    layer.load_codes_(stored.codes)
    layer.dtype = dtype
    if stored.bias is not None:
        put_tensor(model, f"{name}.bias", stored.bias.detach())


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
