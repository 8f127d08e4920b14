"""Small random checkpoints in published low-bit formats, written bit by bit, and the dense weights they stand for.

Nothing here is shared with what reads them: integers are put into words one at a time with Python's own integers.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

Tensors = dict[str, Tensor]


def words(values: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Pack rows (n, m) of unsigned integers along n, the first in the lowest bits, into int32 (n * bits / 32, m)."""
    array = values.numpy()
    count = len(array) * bits // 32
    packed = np.zeros((count, array.shape[1]), dtype=np.uint32)
    for column in range(array.shape[1]):
        stream = 0
        for place in range(len(array)):
            block, inside = divmod(place, 8)
            source = place if order is None else 8 * block + order[inside]
            stream |= int(array[source, column]) << (bits * place)
        for word in range(count):
            packed[word, column] = (stream >> (32 * word)) & 0xFFFFFFFF
    return torch.from_numpy(packed.view(np.int32).copy())


def affine(weight: Tensor, bits: int, groups: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return integers, zeros and fp16 scales (out, groups) of a weight whose columns are in groups, and the values."""
    top, count = 2**bits - 1, int(groups.max()) + 1
    scales, zeros = torch.empty(len(weight), count), torch.empty(len(weight), count)
    for group in range(count):
        part = weight[:, groups == group]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scales[:, group] = ((high - low) / top).half().float()
        zeros[:, group] = (-low / scales[:, group]).round().clamp(0, top)
    integers = (weight / scales[:, groups] + zeros[:, groups]).round().clamp(0, top)
    return integers, zeros, scales, (integers - zeros[:, groups]) * scales[:, groups]


def gptq(
    weight: Tensor, bits: int = 4, size: int = 32, desc_act: bool = False, v2: bool = False
) -> tuple[Tensors, Tensor]:
    columns = weight.shape[1]
    groups = torch.arange(columns) // (columns if size == -1 else size)
    if desc_act:
        groups = groups[torch.randperm(columns, generator=torch.Generator().manual_seed(columns))]
    integers, zeros, scales, dense = affine(weight, bits, groups)
    stored = zeros if v2 else (zeros - 1) % 2**bits
    return {
        ".qweight": words(integers.t().long(), bits),
        ".qzeros": words(stored.long(), bits).t().contiguous(),
        ".scales": scales.half().t().contiguous(),
        ".g_idx": groups.int(),
    }, dense


def awq(weight: Tensor, size: int = 32) -> tuple[Tensors, Tensor]:
    integers, zeros, scales, dense = affine(weight, 4, torch.arange(weight.shape[1]) // size)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        ".qweight": words(integers.long(), 4, order).t().contiguous(),
        ".qzeros": words(zeros.long(), 4, order).t().contiguous(),
        ".scales": scales.half().t().contiguous(),
    }, dense


def packed_integers(
    weight: Tensor, bits: int = 4, size: int = 32, symmetric: bool = False, plain: bool = False
) -> tuple[Tensors, Tensor]:
    rows, columns = weight.shape
    size = columns if size == -1 else size
    groups, middle = torch.arange(columns) // size, 2 ** (bits - 1)
    if symmetric:
        scales = (weight.unflatten(1, (-1, size)).abs().amax(2) / (middle - 1)).bfloat16().float()
        signed = (weight / scales[:, groups]).round().clamp(-middle, middle - 1)
        zeros, dense = torch.zeros_like(scales), signed * scales[:, groups]
    else:
        integers, unsigned, scales, _ = affine(weight, bits, groups)
        scales = scales.bfloat16().float()
        signed, zeros = integers - middle, unsigned - middle
        dense = (signed - zeros[:, groups]) * scales[:, groups]
    tensors = {".weight_scale": scales.bfloat16()}
    if plain:
        tensors[".weight"] = signed.to(torch.int8)
    else:
        tensors[".weight_packed"] = words((signed + middle).t().long(), bits).t().contiguous()
        tensors[".weight_shape"] = torch.tensor([rows, columns])
    if not symmetric:
        tensors[".weight_zero_point"] = zeros.to(torch.int8) if plain else words((zeros + middle).long(), bits)
    return tensors, dense


def fp8(weight: Tensor, block: tuple[int, int] | None, end: str = ".weight_scale_inv") -> tuple[Tensors, Tensor]:
    """Return FP8 codes with one scale a block; a block of (0, 0) is the whole tensor, its scale without a dimension."""
    rows, columns = weight.shape
    height, width = (rows, columns) if block == (0, 0) else block or (1, columns)
    grid = (-(-rows // height), -(-columns // width))
    scale, stored, dense = torch.empty(grid), torch.empty(rows, columns), torch.empty(rows, columns)
    for i in range(grid[0]):
        for j in range(grid[1]):
            part = (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
            scale[i, j] = weight[part].abs().max() / 448
            stored[part] = weight[part] / scale[i, j]
            dense[part] = stored[part].to(torch.float8_e4m3fn).float() * scale[i, j]
    return {".weight": stored.to(torch.float8_e4m3fn), end: scale.squeeze() if block == (0, 0) else scale}, dense


E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def mxfp4(stack: Tensor) -> tuple[Tensors, Tensor]:
    """Return the codes of a stack (experts, out, in)."""
    blocks = stack.unflatten(-1, (-1, 32))
    exponents = (blocks.abs().amax(-1) / 6).log2().ceil()
    values = blocks / exponents.exp2()[..., None]
    codes = (values.abs()[..., None] - E2M1).abs().argmin(-1)
    dense = E2M1[codes] * values.sign() * exponents.exp2()[..., None]
    codes = codes + 8 * (values < 0)
    pairs = codes.unflatten(-1, (-1, 2))
    return {
        "_blocks": (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8),
        "_scales": (exponents + 127).to(torch.uint8),
    }, dense.flatten(-2)


class Published(NamedTuple):
    """A format to write a model in: what config.json says, and the tensors of a layer with the weight they mean."""

    config: dict[str, Any]
    layer: Callable[[Tensor], tuple[Tensors, Tensor]]


def _compressed(form: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
    }  # fmt: skip


INT = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
PUBLISHED = {
    "fp8_blocks": Published({**FP8, "weight_block_size": [32, 32]}, lambda w: fp8(w, (32, 32))),
    "fp8_128": Published({**FP8, "weight_block_size": [128, 128]}, lambda w: fp8(w, (128, 128))),
    "fp8_wide": Published({**FP8, "weight_block_size": [16, 32]}, lambda w: fp8(w, (16, 32))),
    "fp8_tensor": Published(FP8, lambda w: fp8(w, (0, 0), ".weight_scale")),
    "fbgemm_fp8": Published({"quant_method": "fbgemm_fp8"}, lambda w: fp8(w, None, ".weight_scale")),
    "gptq": Published(GPTQ, gptq),
    "gptq_v2": Published({**GPTQ, "checkpoint_format": "gptq_v2"}, lambda w: gptq(w, v2=True)),
    "gptq_desc_act": Published({**GPTQ, "desc_act": True}, lambda w: gptq(w, desc_act=True)),
    "gptq_2": Published({**GPTQ, "bits": 2}, lambda w: gptq(w, 2)),
    "gptq_3": Published({**GPTQ, "bits": 3}, lambda w: gptq(w, 3)),
    "gptq_8": Published({**GPTQ, "bits": 8, "group_size": -1}, lambda w: gptq(w, 8, -1)),
    "awq": Published(
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, awq
    ),
    "packed_int4": Published(_compressed("pack-quantized", **INT), packed_integers),
    "packed_int4_symmetric": Published(
        _compressed("pack-quantized", **{**INT, "symmetric": True}), lambda w: packed_integers(w, symmetric=True)
    ),
    "packed_int8": Published(
        _compressed("pack-quantized", **{**INT, "num_bits": 8, "strategy": "channel", "group_size": None}),
        lambda w: packed_integers(w, 8, -1),
    ),
    "plain_int8": Published(
        _compressed("int-quantized", type="int", num_bits=8, strategy="channel", symmetric=True),
        lambda w: packed_integers(w, 8, -1, True, True),
    ),
    "float_channel": Published(
        _compressed("float-quantized", type="float", num_bits=8, strategy="channel", symmetric=True),
        lambda w: fp8(w, None, ".weight_scale"),
    ),
    "float_block": Published(
        _compressed("float-quantized", type="float", num_bits=8, strategy="block", block_structure=[32, 32]),
        lambda w: fp8(w, (32, 32), ".weight_scale"),
    ),
}  # fmt: skip


def publish(model: PreTrainedModel, folder: Path, form: Published, dense_folder: Path | None = None) -> Tensors:
    """Write the model with every linear layer of its blocks in that format; return the dense weights of these, by name.

    `dense_folder` gets the plain model of the same weights.
    """
    state, meant = {name: t.clone() for name, t in model.state_dict().items()}, {}
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    tensors = {name: t for name, t in state.items() if name not in tied}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            parts, meant[f"{name}.weight"] = form.layer(tensors.pop(f"{name}.weight").float())
            tensors |= {f"{name}{end}": tensor for end, tensor in parts.items()}
    write(model, folder, tensors, form.config)
    if dense_folder is not None:
        model.load_state_dict({**state, **meant})
        model.save_pretrained(dense_folder)
    return meant


def write(model: PreTrainedModel, folder: Path, tensors: Tensors, quantization: dict[str, Any]) -> None:
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    words_of = json.loads(path.read_text()) | {
        "quantization_config": quantization, "architectures": [type(model).__name__],
    }  # fmt: skip
    path.write_text(json.dumps(words_of))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def publish_experts(model: PreTrainedModel, folder: Path, form: Published, dense_folder: Path) -> Tensors:
    """Write a mixture of experts with a matrix an expert, as most are published, each in that format.

    The result has the dense stacks and layers that they mean, by name.
    """
    model.save_pretrained(dense_folder)
    from safetensors.torch import load_file

    tensors: Tensors = {}
    for name, tensor in load_file(dense_folder / "model.safetensors").items():
        layer, _, leaf = name.rpartition(".")
        is_linear = leaf == "weight" and ("_proj" in layer or "experts." in layer)
        if not is_linear:
            tensors[name] = tensor
            continue
        parts, dense = form.layer(tensor.float())
        tensors |= {f"{layer}{end}": part for end, part in parts.items()}
        tensors[f"{name} dense"] = dense
    dense = {name.removesuffix(" dense"): tensors.pop(name) for name in list(tensors) if name.endswith(" dense")}
    save_file(
        load_file(dense_folder / "model.safetensors") | dense, dense_folder / "model.safetensors", {"format": "pt"}
    )
    write(model, folder, tensors, form.config)
    return dense


def publish_mxfp4(model: PreTrainedModel, folder: Path, dense_folder: Path) -> Tensors:
    """Write a GPT-OSS with its experts in MXFP4; return the dense stacks (experts, out, in) by name."""
    tensors, meant = {name: t.clone() for name, t in model.state_dict().items()}, {}
    dense = dict(tensors)
    for name in list(tensors):
        if name.endswith(("gate_up_proj", "down_proj")):
            parts, meant[name] = mxfp4(tensors.pop(name).mT.float())
            tensors |= {f"{name}{end}": part for end, part in parts.items()}
            dense[name] = meant[name].mT.contiguous()
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    write(model, folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": skipped})
    model.load_state_dict(dense)
    model.save_pretrained(dense_folder)
    return meant
