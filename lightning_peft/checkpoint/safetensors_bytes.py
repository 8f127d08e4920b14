"""The tensors in the bytes of a safetensors file, which they share: a server waits for hundreds of small ones.

The format is 8 bytes of the header's length, the header as JSON, and the numbers. The library copies each tensor out of
them, which takes half as long again; what is not plain here is left to it, and so is the word on what is wrong with a
file.
"""

import json
import math

import torch
from safetensors.torch import load
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def tensors_of(content: bytearray) -> dict[str, Tensor]:
    """Return the tensors by name. Raises SafetensorError for bytes that are no such file."""
    try:
        return _views(content)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        return load(bytes(content))


def _views(content: bytearray) -> dict[str, Tensor]:
    """Return tensors that share the bytes. Raises one of many errors where a plain header does not say just these."""
    start = 8 + int.from_bytes(content[:8], "little")
    if start > len(content):
        raise ValueError("the header is longer than the file")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    entries = [(*own["data_offsets"], DTYPES[own["dtype"]], own["shape"], name) for name, own in header.items()]
    found, end = {}, 0
    for first, last, dtype, shape, name in sorted(entries, key=lambda entry: entry[:2]):
        size = math.prod(shape)
        if first != end or last != first + size * dtype.itemsize or (start + first) % dtype.itemsize:
            raise ValueError(f"{name} does not fill its place")
        end = last
        found[name] = torch.frombuffer(content, dtype=dtype, count=size, offset=start + first).view(shape)
    if start + end != len(content):
        raise ValueError("there is more than the header says")
    return found
