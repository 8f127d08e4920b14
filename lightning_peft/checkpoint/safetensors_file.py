"""One read of a safetensors file for all its tensors: one by one their calls take longer than the bytes."""

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Numbers that are read at once; a file that has others is read by the library."""


def read_file(path: Path) -> tuple[dict[str, Tensor], bytearray]:
    """Return the tensors of a file, which share its memory, and its bytes. Raises SafetensorError, OSError."""
    with safe_open(path, "pt") as file:  # its checks of the header: no tensor lies outside, or over another
        content = bytearray(path.read_bytes())
        begin = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:begin])
        header.pop("__metadata__", None)
        found: dict[str, Tensor] = {}
        for name, entry in header.items():
            shape, dtype = entry["shape"], DTYPES.get(entry["dtype"])
            if dtype is None or 0 in shape:
                found[name] = file.get_tensor(name)
                continue
            at = begin + entry["data_offsets"][0]
            found[name] = torch.frombuffer(content, dtype=dtype, count=math.prod(shape), offset=at).view(shape)
    return found, content
