"""4-bit layers as bitsandbytes writes them into checkpoints, both ways."""

from collections.abc import Mapping

import torch
from bitsandbytes.functional import QuantState, get_4bit_type
from bitsandbytes.utils import unpack_tensor_to_dict
from torch import Tensor, nn

from lightning_peft.kernels.codes import ABSMAX_BLOCK, Codes, dynamic_map
from lightning_peft.quantization.linear import QuantizedLinear

PACKED = "weight.quant_state.bitsandbytes__"
"""Key of the numbers that are no tensors, as the bytes of a JSON text; followed by the kind."""


def to_bitsandbytes_state(layer: QuantizedLinear) -> dict[str, Tensor]:
    """Return the state dict of the equal `bitsandbytes.nn.Linear4bit`, keys relative to the layer."""
    codes, device = layer.codes, layer.weight.device
    second = None
    if layer.double_quantization:
        second = QuantState(
            absmax=codes.absmax_scale, code=dynamic_map(device), blocksize=ABSMAX_BLOCK, dtype=torch.float32
        )
    state = QuantState(
        absmax=codes.absmax.detach().reshape(-1),
        shape=torch.Size((layer.out_features, layer.in_features)),
        code=get_4bit_type(layer.kind, device=device),
        blocksize=layer.block_size,
        quant_type=layer.kind,
        dtype=layer.dtype,
        offset=codes.absmax_offset,
        state2=second,
    )
    tensors = {"weight": codes.weight.detach().reshape(-1, 1)}
    tensors.update({f"weight.{key}": value for key, value in state.as_dict(packed=True).items()})
    if layer.bias is not None:
        tensors["bias"] = layer.bias.detach()
    return tensors


def from_bitsandbytes_state(state: Mapping[str, Tensor]) -> QuantizedLinear:
    """Return the layer a `bitsandbytes.nn.Linear4bit` state dict describes, keys relative to the layer.

    Codes are not copied.

    Raises ValueError when the codes are packed in a way 4-bit layers here cannot hold.
    """
    packed = [key for key in state if key.startswith(PACKED)]
    if len(packed) != 1:
        raise ValueError(
            f"no 4-bit layer of bitsandbytes: needs one key {PACKED}nf4 or {PACKED}fp4, got {sorted(state)}"
        )
    layer = layer_without_codes(state[packed[0]])
    double, rows = layer.double_quantization, layer.out_features
    levels = state["weight.quant_map"]
    if not torch.equal(levels.cpu(), get_4bit_type(layer.kind, device="cpu")):
        raise ValueError(f"quant_map of the layer is not bitsandbytes' {layer.kind} levels")
    offset = unpack_tensor_to_dict(state[packed[0]]).get("nested_offset")
    codes = state["weight"].view(torch.uint8)  # bytes may be stored under a floating dtype (quant_storage)
    device = codes.device
    layer.load_codes_(
        Codes(
            codes.view(rows, -1),
            state["weight.absmax"].view(rows, -1),
            state["weight.nested_absmax"] if double else None,
            torch.tensor(offset, device=device) if double else None,
        )
    )
    if "bias" in state:
        layer.bias = nn.Parameter(state["bias"])
    return layer


def layer_without_codes(packed: Tensor) -> QuantizedLinear:
    """Return the layer, without values and bias, that the `PACKED` tensor of a state dict describes.

    Raises ValueError as `from_bitsandbytes_state` does.
    """
    numbers = unpack_tensor_to_dict(packed)
    nested_block_size = numbers.get("nested_blocksize")
    if nested_block_size not in (None, ABSMAX_BLOCK):
        raise ValueError(f"nested_blocksize={nested_block_size}: scales must be quantised in blocks of 256")
    out_features, in_features = numbers["shape"]
    return QuantizedLinear(
        in_features, out_features, kind=numbers["quant_type"], block_size=numbers["blocksize"],
        double_quantization=nested_block_size is not None, dtype=getattr(torch, numbers["dtype"]),
    )  # fmt: skip
