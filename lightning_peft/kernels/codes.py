"""Weights stored as codes and products with them, as operators over the kernels of bitsandbytes.

Codes have 4 bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), or 8 bits and one scale a row (the weights of
LLM.int8, Dettmers et al. 2022, arXiv:2208.07339), or are those of a published checkpoint (`kernels/low_bit.py`). The
plain form of a product is `dequantize` and a product of torch.

Importing bitsandbytes takes about four seconds, most of it torch's compiler, so the import waits until the first layer
is quantised.
"""

import logging
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_peft.kernels import products  # noqa: F401  registers low_rank_sum
from lightning_peft.kernels.low_bit import LOW_BIT, dequantize_low_bit

ABSMAX_BLOCK = 256
"""Block size of the second quantisation, fixed in bitsandbytes; the paper's section 3 also uses 256."""

logger = logging.getLogger(__name__)

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


INT8 = "int8"


class Codes(NamedTuple):
    """A quantised weight of shape (out, in): what is stored of it.

    For a kind of `LOW_BIT` the four are the codes, scales, zeros and groups that `dequantize_low_bit` takes.
    """

    weight: Tensor
    """(out, in / 2) uint8: two codes a byte, the even column in the high half. For int8 (out, in), its bytes."""
    absmax: Tensor
    """(out, in / block_size): fp32, or uint8 codes of it when quantised twice. For int8 (out, 1)."""
    absmax_scale: Tensor | None
    """(ceil(absmax.numel() / 256),) fp32: absolute maxima of the absmax blocks; None unless quantised twice."""
    absmax_offset: Tensor | None
    """() fp32: mean of the absmax, taken off before it is quantised; None unless quantised twice."""


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """Return the levels of bitsandbytes' signed dynamic 8-bit type, (256,) fp32: one tensor per device."""
    from bitsandbytes.functional import create_dynamic_map  # the import is slow, see the module docstring

    return create_dynamic_map(signed=True).to(device)


def check_blocks(in_features: int, block_size: int) -> str | None:
    """Return why rows of `in_features` cannot be quantised, or None.

    No block may straddle rows: ranks hold whole rows.
    """
    if in_features % block_size == 0:
        return None
    fitting = [size for size in (32, 64, 128, 256) if in_features % size == 0]
    return f"in_features {in_features} is no multiple of block size {block_size}" + (
        f" (block size {max(fitting)} would fit)" if fitting else ""
    )


CHUNK_WEIGHTS = {"cpu": 2**18, "cuda": 2**26}
"""Weights quantised at once by device. Ours: no extra peak memory; on a CPU they stay in the caches, on a GPU a layer
is a few launches."""


@torch.no_grad()
def quantize(weight: Tensor, kind: str = "nf4", block_size: int = 64, double_quantization: bool = True) -> Codes:
    """Return the codes of a dense (out, in) float weight, bit for bit those of bitsandbytes' `quantize_4bit`.

    For int8 the codes equal `int8_vectorwise_quant`, and the last two arguments are ignored.
    """
    import bitsandbytes  # noqa: F401  registers the kernels; slow import, see the module docstring

    rows, columns = weight.shape
    if kind == INT8:
        absmax = weight.detach().float().abs().amax(1, keepdim=True)
        levels = (weight.detach().float() * (127 / absmax.clamp_min(torch.finfo(torch.float32).tiny))).round_()
        return Codes(levels.to(torch.int8).view(torch.uint8), absmax, None, None)
    if problem := check_blocks(columns, block_size):
        raise ValueError(f"quantization.block_size={block_size}: {problem}")
    weight = weight.detach().contiguous()
    if weight.dtype not in KERNEL_DTYPES:
        weight = weight.float()
    # A few rows at a time: the operator takes twelve bytes of temporaries a weight.
    parts = [
        torch.ops.bitsandbytes.quantize_4bit(part, block_size, kind, torch.uint8)
        for part in weight.split(max(1, CHUNK_WEIGHTS.get(weight.device.type, CHUNK_WEIGHTS["cuda"]) // columns))
    ]
    codes = torch.cat([part[0].view(-1, columns // 2) for part in parts])
    absmax = torch.cat([part[1].view(-1) for part in parts])
    if not double_quantization:
        return Codes(codes, absmax.view(rows, -1), None, None)
    offset = absmax.mean()
    absmax, scale = torch.ops.bitsandbytes.quantize_blockwise(absmax - offset, dynamic_map(weight.device), ABSMAX_BLOCK)
    return Codes(codes, absmax.view(rows, -1), scale, offset)


@cache
def levels(kind: str, device: torch.device) -> Tensor:
    """Return the sixteen values that the codes of nf4 or fp4 stand for, fp32: one tensor per device."""
    from bitsandbytes.functional import get_4bit_type  # the import is slow, see the module docstring

    return get_4bit_type(kind, device=str(device)).float()


@cache
def has_triton() -> bool:
    """Return whether there is Triton, which comes with torch where there is CUDA."""
    return find_spec("triton") is not None


@cache
def has_decoder() -> bool:
    """Return whether there is Triton to decode with in one launch; without it bitsandbytes takes three."""
    if has_triton():
        return True
    logger.info("4-bit weights are decoded by three kernels of bitsandbytes: there is no triton for one")
    return False


@torch.no_grad()
def dequantize(codes: Codes, kind: str, block_size: int, dtype: torch.dtype) -> Tensor:
    """Return the dense (out, in) weight: level times absmax in fp32, rounded once to `dtype`."""
    weight, absmax, scale, offset = codes
    if kind in LOW_BIT:
        return dequantize_low_bit(*codes, kind, block_size, dtype)
    if kind == INT8:
        return weight.view(torch.int8).float().mul_(absmax / 127).to(dtype)
    if weight.is_cuda and has_decoder():
        return _decoded(codes, kind, block_size, dtype)
    if scale is not None and offset is not None:
        absmax = torch.ops.bitsandbytes.dequantize_blockwise(
            absmax, scale, dynamic_map(absmax.device), ABSMAX_BLOCK, torch.float32
        ).add_(offset)
    kernel_dtype = dtype if dtype in KERNEL_DTYPES else torch.float32
    shape = (weight.shape[0], weight.shape[1] * 2)
    # Flat codes and maxima: what the kernels of every backend take, (1, n) would read as a transposed weight.
    dense = torch.ops.bitsandbytes.dequantize_4bit(
        weight.view(-1, 1), absmax.view(-1), block_size, kind, shape, kernel_dtype
    )
    return dense.to(dtype)


def _decoded(
    codes: Codes, kind: str, block_size: int, dtype: torch.dtype, edge: Tensor | None = None, below: bool = False
) -> Tensor:
    device = codes.weight.device
    kernel_dtype = dtype if dtype in KERNEL_DTYPES else torch.float32
    tables, options = (dynamic_map(device), levels(kind, device)), (block_size, kernel_dtype, edge, below)
    return torch.ops.lightning_peft.decode(*codes, *tables, *options).to(dtype)


@torch.no_grad()
def dequantize_with_edge(codes: Codes, kind: str, block_size: int, edge: Tensor, below: bool) -> Tensor:
    """Return the dense weight of 4-bit codes, in the edge's dtype, and the edge beside it or below it."""
    if codes.weight.is_cuda and has_decoder():
        return _decoded(codes, kind, block_size, edge.dtype, edge, below)
    return torch.cat([dequantize(codes, kind, block_size, edge.dtype), edge], 0 if below else 1)


# Opaque operators for the compiler: if it saw the two dequantisations, forward's and backward's, it would merge them
# into one and keep the dense weight of every layer alive in between.
_library = torch.library.Library("lightning_peft", "DEF")
_library.define(
    "coded_matmul(Tensor x, Tensor weight, Tensor absmax, Tensor? absmax_scale, Tensor? absmax_offset, Tensor? bias, "
    "Tensor? inner, Tensor? factor, Tensor? gain, str kind, int block_size, bool transpose) -> Tensor"
)
_library.define(
    "dequantize(Tensor weight, Tensor absmax, Tensor? absmax_scale, Tensor? absmax_offset, str kind, int block_size, "
    "ScalarType dtype) -> Tensor"
)


_library.define(
    "decode(Tensor weight, Tensor absmax, Tensor? absmax_scale, Tensor? absmax_offset, Tensor absmax_levels, "
    "Tensor levels, int block_size, ScalarType dtype, Tensor? edge=None, bool below=False) -> Tensor"
)


@torch.library.impl("lightning_peft::decode", "CUDA", lib=_library)
def _decode(
    weight: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    absmax_levels: Tensor,
    code_levels: Tensor,
    block_size: int,
    dtype: torch.dtype,
    edge: Tensor | None = None,
    below: bool = False,
) -> Tensor:
    from lightning_peft.kernels.triton_codes import decode  # Triton is there where CUDA is

    options = ABSMAX_BLOCK, code_levels, block_size, dtype, edge, below
    return decode(weight, absmax, absmax_scale, absmax_offset, absmax_levels, *options)


@torch.library.register_fake("lightning_peft::decode", lib=_library)
def _decode_fake(weight: Tensor, *rest: Any) -> Tensor:
    dtype, edge, below = (*rest[6:], None, False)[:3]
    shape = [weight.shape[0], 2 * weight.shape[1]]
    if edge is not None:
        shape[not below] += edge.shape[not below]
    return weight.new_empty(shape, dtype=dtype)


@torch.library.impl("lightning_peft::dequantize", "CompositeExplicitAutograd", lib=_library)
def _dequantize(
    weight: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    kind: str,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    return dequantize(Codes(weight, absmax, absmax_scale, absmax_offset), kind, block_size, dtype)


@torch.library.register_fake("lightning_peft::dequantize", lib=_library)
def _dequantize_fake(
    weight: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    kind: str,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    return weight.new_empty(weight.shape[0], in_features_of(weight, kind), dtype=dtype)


def in_features_of(weight: Tensor, kind: str) -> int:
    """Return the columns of the weight that codes (out, columns of codes) stand for."""
    return weight.shape[1] * codes_per_byte(kind)


def codes_per_byte(kind: str) -> int:
    """Return how many codes of a kind lie in a byte."""
    return LOW_BIT[kind].per_byte if kind in LOW_BIT else 1 if kind == INT8 else 2


@torch.library.impl("lightning_peft::coded_matmul", "CompositeExplicitAutograd", lib=_library)
def _coded_matmul(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    bias: Tensor | None,
    inner: Tensor | None,
    factor: Tensor | None,
    gain: Tensor | None,
    kind: str,
    block_size: int,
    transpose: bool,
) -> Tensor:
    """Return x W^T + bias or, without `transpose`, x W; with inner and factor what `low_rank_sum` makes of them."""
    dense = dequantize(Codes(weight, absmax, absmax_scale, absmax_offset), kind, block_size, x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if inner is not None and factor is not None:
        return torch.ops.lightning_peft.low_rank_sum(x, dense, inner, factor, gain, bias, transpose)
    # The sum goes into a tensor of its own: a view made in here could not be written over by an adapter.
    output = x.new_empty(*x.shape[:-1], dense.shape[0 if transpose else 1])
    rows, matrix = x.reshape(-1, x.shape[-1]), dense.t() if transpose else dense
    if bias is None:
        torch.mm(rows, matrix, out=output.view(-1, output.shape[-1]))
    else:
        torch.addmm(bias, rows, matrix, out=output.view(-1, output.shape[-1]))
    return output


@torch.library.register_fake("lightning_peft::coded_matmul", lib=_library)
def _coded_matmul_fake(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    bias: Tensor | None,
    inner: Tensor | None,
    factor: Tensor | None,
    gain: Tensor | None,
    kind: str,
    block_size: int,
    transpose: bool,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] if transpose else in_features_of(weight, kind))


class CodedMatmul(torch.autograd.Function):
    """x W^T + bias for coded W. Forward and backward dequantise once each; the dense weight is never saved.

    x and bias have gradients. x may have any float dtype; W is dequantised to it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        absmax: Tensor,
        absmax_scale: Tensor | None,
        absmax_offset: Tensor | None,
        bias: Tensor | None,
        kind: str,
        block_size: int,
    ) -> Tensor:
        ctx.save_for_backward(weight, absmax, absmax_scale, absmax_offset, bias)
        ctx.kind, ctx.block_size = kind, block_size
        return torch.ops.lightning_peft.coded_matmul(
            x, weight, absmax, absmax_scale, absmax_offset, bias, None, None, None, kind, block_size, True
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        *codes, bias = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.lightning_peft.coded_matmul(
                grad, *codes, None, None, None, None, ctx.kind, ctx.block_size, False
            )
        if ctx.needs_input_grad[5]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(bias.dtype)
        return grad_x, None, None, None, None, grad_bias, None, None
