"""Weights read one tensor at a time into a model that has none, quantised on the way where asked.

Host memory stays under the filled part of the model plus its largest tensor: safetensors and GGUF files are mapped, and
nothing dense outlives its own step. The transformer blocks come last, one after another, so that each can be sharded
before the next is read.
"""

import logging
import re
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_peft.models.blocks import block_names
from lightning_peft.models.conversion import Fusion, LoadingPlan, plan_loading
from lightning_peft.models.low_bit_source import LowBitSource, prepare_low_bit_layers
from lightning_peft.models.multimodal import remember_files
from lightning_peft.models.weight_files import PickledSource, SafetensorsSource, WeightSource
from lightning_peft.quantization.config import QuantizationConfig
from lightning_peft.quantization.linear import CodedWeight, QuantizedLinear
from lightning_peft.quantization.published.layers import load_low_bit
from lightning_peft.quantization.published.registry import check_not_requantised
from lightning_peft.quantization.quantize import load_weight, prepare_quantized

logger = logging.getLogger(__name__)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Give modules built inside parameters on the meta device and real buffers, such as rotary frequencies."""
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
    rules; layers that the checkpoint holds in codes keep them. Raises ValueError where the checkpoint lacks a weight or
    has one of another shape or kind of number.
    """
    targets = {name: tensor.shape for name, tensor in model.state_dict().items()}
    floating = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    missing = set(targets)
    codes = bitsandbytes_layers(source)
    beside = {key for keys in codes.values() for key in keys if ".weight." in key}
    plan = plan_loading(model, [k for k in source.names() if k not in beside], set(targets))
    coded = take_coded_layers(plan, codes)
    direct, fused, unexpected = plan.direct, plan.fused, plan.unexpected
    if plan.left:
        remember_files(model, files_of(source, plan.left))
    known = model._keys_to_ignore_on_load_unexpected or []
    if unused := [key for key in unexpected if not any(re.search(p, key) for p in [*known, r"rotary_emb\.inv_freq"])]:
        logger.warning("%d weights of the checkpoint are not in the model: %s", len(unused), _some(unused))
    if codes:
        check_quantization(codes, quantization)
        prepare_bitsandbytes_layers(model, source, codes, coded)
    low_bit: set[str] = set()
    if isinstance(source, LowBitSource):
        check_not_requantised(source.form, quantization)
        low_bit = set(prepare_low_bit_layers(model, source, direct, fused))
    elif not codes and quantization is not None and quantization.is_on:
        prepare_quantized(model, quantization)
    fp32_names = fp32_pattern(model, dtype)
    optional = model._keys_to_ignore_on_load_missing or []
    empty: list[str] = []

    def dtype_of(name: str) -> torch.dtype | None:
        return torch.float32 if fp32_names is not None and fp32_names.search(name) else dtype

    def place(name: str, tensor: Tensor) -> None:
        if tensor.shape != targets[name]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} in the file and {tuple(targets[name])} in the model: "
                "its configuration belongs to other weights"
            )
        if name in floating and (not tensor.is_floating_point() or tensor.itemsize == 1):
            raise ValueError(
                f"{name} is stored as {tensor.dtype}, which needs scales, and config.json has no quantization_config "
                "that says which: give the config.json that the weights were published with"
            )
        if is_empty(tensor):
            empty.append(name)
        put_tensor(model, name, tensor.to(device))
        missing.discard(name)

    def read(name: str, key: str) -> None:
        if name in low_bit:
            assert isinstance(source, LowBitSource)
            load_low_bit(model, name, source.read_codes(key).to(device))
            missing.discard(name)
        else:
            place(name, source.read(key, dtype_of(name)))

    def convert(fusion: Fusion) -> None:
        if fusion.name in low_bit:
            assert isinstance(source, LowBitSource)
            load_low_bit(model, fusion.name, source.read_fused(model, fusion).to(device))
            missing.discard(fusion.name)
            return
        for name, tensor in fusion.run(model, lambda key: source.read(key, None), targets):
            wanted = dtype_of(name) if tensor.is_floating_point() and tensor.itemsize > 1 else None
            place(name, tensor.to(wanted or tensor.dtype))

    def read_codes(name: str, stored: str) -> None:
        assert dtype is not None, "codes are computed with in some dtype"
        tensors = {key.removeprefix(f"{stored}."): source.read(key, None) for key in codes[stored]}
        put_bitsandbytes_layer(model, name, tensors, dtype, device)
        missing.difference_update(f"{name}.{end}" for end in tensors)

    steps: dict[str, list[Callable[[], None]]] = {part: [] for part in ("", *block_names(model))}
    for name, key in direct.items():
        steps[part_of(name, steps)].append(partial(read, name, key))
    for name, fusion in fused.items():
        steps[part_of(name, steps)].append(partial(convert, fusion))
    for name, stored in coded.items():
        steps[part_of(name, steps)].append(partial(read_codes, name, stored))

    for part in steps:
        for step in steps[part]:
            step()
        steps[part].clear()
        if not part:
            model.tie_weights(missing_keys=missing, recompute_mapping=False)
            for buffer_name, buffer in model.named_buffers():
                if not buffer.is_meta and buffer.device != device:
                    put_tensor(model, buffer_name, buffer.to(device))
        for name in [name for name in missing if part_of(name, steps) == part]:
            # A block's weights may be another's, as Zamba 2 repeats one; the checkpoint holds them once.
            source_name = model.all_tied_weights_keys.get(name)
            if source_name is not None and source_name in targets and source_name not in missing:
                share_tensor(model, name, source_name)
                missing.discard(name)
        lacking = [name for name in missing if part_of(name, steps) == part]
        if lacking := sorted(name for name in lacking if not any(re.search(pattern, name) for pattern in optional)):
            told = f"the checkpoint lacks {len(lacking)} weights of {type(model).__name__}: {_some(lacking)}"
            raise ValueError(f"{told}; {remedy_for(model, lacking, unused)}")
        yield part
    if empty:
        logger.warning(
            "%d weight matrices of the checkpoint are all zeros: %s; where its publisher did not mean that, a download "
            "was cut short, so fetch it again", len(empty), _some(empty),
        )  # fmt: skip


def is_empty(tensor: Tensor) -> bool:
    """Return whether a weight matrix is all zeros, as in a file whose place was taken and whose bytes did not come."""
    if tensor.ndim < 2 or not tensor.is_floating_point() or tensor.itemsize == 1:
        return False
    first = tensor.reshape(-1)[:1024]
    return not first.any() and not tensor.any()


def remedy_for(model: PreTrainedModel, lacking: list[str], unused: list[str]) -> str:
    """Return what to do where a checkpoint lacks weights, and which of its own have no place."""
    head: object = model.get_output_embeddings()  # type: ignore[operator]
    if all(model.get_submodule(name.rpartition(".")[0]) is head for name in lacking):
        return "where its head is its embedding, config.json says so as tie_word_embeddings: true"
    if unused:
        return f"{len(unused)} of its own are not in the model: {_some(unused)}; take the config.json that is theirs"
    return "take the config.json that it was published with, or fetch the files again"


def part_of(name: str, parts: Container[str]) -> str:
    """Return the part that a parameter's name lies in; "" where that is none of them."""
    words = name.split(".")
    return next((part for end in range(1, len(words)) if (part := ".".join(words[:end])) in parts), "")


def files_of(source: WeightSource, keys: list[str]) -> dict[str, Path]:
    """Return the file of each key of a part that stays on disk. Raises ValueError for one in few bits."""
    if isinstance(source, LowBitSource):
        if coded := [key for key in keys if key in source.coded]:
            raise ValueError(
                f"{coded[0]} is {source.form.describe()} in a part that reads no text and would be saved back as it "
                "is, beside dense text; give the original model"
            )
        source = source.source
    assert isinstance(source, SafetensorsSource | PickledSource), "others hold the text alone"
    return {key: source.paths[key] for key in keys}


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
    """Return a pattern of the names of the parameters this architecture keeps in fp32, such as routing biases."""
    if dtype is None:
        return None
    names = set(model._keep_in_fp32_modules_strict or ()) if dtype != torch.float32 else set()
    if dtype == torch.float16:
        names |= set(model._keep_in_fp32_modules or ())
    return re.compile("|".join(rf"(^|\.){name}(\.|$)" for name in sorted(names))) if names else None


def bitsandbytes_layers(source: WeightSource) -> dict[str, set[str]]:
    """Return the layers whose weights the checkpoint holds as bitsandbytes' 4-bit codes, with their keys."""
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


def take_coded_layers(plan: LoadingPlan, codes: Mapping[str, set[str]]) -> dict[str, str]:
    """Take the layers that bitsandbytes has quantised out of a plan; return the checkpoint's name by the model's.

    Raises ValueError for one that is no layer by itself in the model, or is in a part that stays on disk.
    """
    found: dict[str, str] = {}
    for name, key in list(plan.direct.items()):
        if (stored := key.rpartition(".")[0]) in codes:
            found[name.rpartition(".")[0]] = stored
            del plan.direct[name]
    members = [key for fusion in plan.fused.values() for key, _ in fusion.members]
    if lost := [key for key in [*members, *plan.left] if key.rpartition(".")[0] in codes]:
        raise ValueError(
            f"{lost[0]} is held as 4-bit codes of bitsandbytes, in a part that reads no text or as no layer by itself; "
            "give the original model with quantization=nf4"
        )
    return found


def check_quantization(layers: dict[str, set[str]], quantization: QuantizationConfig | None) -> None:
    """Raise ValueError where the checkpoint's own 4-bit kind is not the one asked for."""
    kinds = {key.rpartition("__")[2] for keys in layers.values() for key in keys if "bitsandbytes__" in key}
    logger.info("%d layers are %s in the checkpoint and stay as they are", len(layers), " and ".join(sorted(kinds)))
    if quantization is not None and quantization.is_on and kinds != {quantization.kind.name}:
        raise ValueError(
            f"quantization.kind={quantization.kind.name}: the checkpoint holds {' and '.join(sorted(kinds))} codes; "
            "use that kind or none"
        )


def prepare_bitsandbytes_layers(
    model: nn.Module, source: WeightSource, codes: Mapping[str, set[str]], layers: Mapping[str, str]
) -> None:
    """Replace the linear layers the checkpoint holds as codes, by its names, by 4-bit ones without values."""
    # This imports bitsandbytes, four seconds that only such a checkpoint needs.
    from lightning_peft.quantization.bitsandbytes_format import PACKED, layer_without_codes

    for name, stored in layers.items():
        (packed,) = (key for key in codes[stored] if key.startswith(f"{stored}.{PACKED}"))
        layer = layer_without_codes(source.read(packed, None))
        layer.bias = model.get_submodule(name).bias  # type: ignore[assignment]
        model.set_submodule(name, layer)


def put_bitsandbytes_layer(
    model: nn.Module, name: str, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device
) -> None:
    """Fill a layer with the codes bitsandbytes stored, by their names below the layer, computing in `dtype`."""
    from lightning_peft.quantization.bitsandbytes_format import from_bitsandbytes_state  # it is as slow as above

    stored = from_bitsandbytes_state(tensors)
    stored = stored.to(device=device, dtype=dtype)
    layer = model.get_submodule(name)
    assert isinstance(layer, QuantizedLinear)
    layer.load_codes_(stored.codes)
    layer.dtype = dtype
    if stored.bias is not None:
        put_tensor(model, f"{name}.bias", stored.bias.detach())


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
