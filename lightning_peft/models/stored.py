"""The contents of a base's files, without a model of it: fingerprint and dtypes."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from lightning_peft.models.gguf import open_gguf
from lightning_peft.models.loading import empty_model, model_config
from lightning_peft.models.low_bit_source import ONLY_LOW_BIT
from lightning_peft.models.source import ModelConfig, files_of_weights, locate, readable_errors, weight_index
from lightning_peft.models.tiny import tiny_model
from lightning_peft.models.weight_files import PickledSource, map_file, stored_kinds, stored_tensors

STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Safetensors' names of the dtypes that weights are computed in."""
CODES = {"U8", "I8", "I32"}
INTEGERS = {"I64", "I16", "BOOL"} | CODES
"""Names of the dtypes that are of buffers, or some of them of codes."""
SAMPLED_BYTES = 1024
"""Bytes of each weight's start, middle and end that go into a fingerprint."""


def source_fingerprint(config: ModelConfig) -> str:
    """Return the SHA-256 of the base's weights as published: names, shapes and bytes sampled from each.

    The fingerprint is the same however the weights are split over files, quantised when loaded or extended by new
    tokens.
    """
    digest = hashlib.sha256()
    for name, shape, data in sorted(_stored_weights(config), key=lambda weight: weight[0]):
        digest.update(f"{name} {list(shape)} ".encode())
        for start in (0, len(data) // 2, max(len(data) - SAMPLED_BYTES, 0)):
            digest.update(data[start : start + SAMPLED_BYTES])
    return digest.hexdigest()


def stored_dtypes(config: ModelConfig) -> Counter[torch.dtype] | None:
    """Return the published weights' number by floating dtype; None for a container of codes, or one not streamed."""
    if config.is_tiny or config.random_weights:
        return Counter({torch.float32: 1})
    with readable_errors(config):
        if not (location := locate(config, weights=True)).is_dir():
            return None
        files = files_of_weights(config, location)
        if files[0].suffix == ".bin":
            tensors = PickledSource(files).tensors.values()
            sizes = [(tensor.dtype, tensor.numel()) for tensor in tensors if tensor.dtype in STORED.values()]
            return sum((Counter({dtype: size}) for dtype, size in sizes), Counter())
        kinds = sum((stored_kinds(path) for path in files), Counter())
        if kinds.keys() - STORED.keys() - INTEGERS or (kinds.keys() & CODES and _is_coded(config, files)):
            return None
    return Counter({STORED[name]: size for name, size in kinds.items() if name in STORED})


def _is_coded(config: ModelConfig, files: Sequence[Path]) -> bool:
    """Return whether integers in a container are codes, and no buffers such as GPT-2's masks."""
    keys = (key for path in files for key, _, _ in stored_tensors(path))
    return getattr(model_config(config), "quantization_config", None) is not None or any(
        ".quant_state." in key or key.endswith(ONLY_LOW_BIT) for key in keys
    )


def _stored_weights(config: ModelConfig) -> Iterator[tuple[str, Sequence[int], memoryview]]:
    """Yield name, shape and stored bytes of every weight, in any order."""
    if config.is_tiny:
        tensors = tiny_model(tied=config.name == "tiny_tied").state_dict()
        yield from ((name, tensor.shape, memoryview(tensor.numpy()).cast("B")) for name, tensor in tensors.items())
        return
    if config.random_weights:
        yield from (
            (name, tensor.shape, memoryview(b"random")) for name, tensor in empty_model(config).state_dict().items()
        )
        return
    with readable_errors(config):
        location = locate(config, weights=True)
        if location.suffix == ".gguf":
            file = open_gguf(location)
            yield from ((name, entry.shape, file.stored(name)) for name, entry in file.tensors.items())
            return
        files, index = files_of_weights(config, location), weight_index(location)
        for path in files:
            if path.suffix == ".bin":
                data = map_file(path)
                yield path.name, [len(data)], data
            else:
                yield from (entry for entry in stored_tensors(path) if index.get(entry[0], path.name) == path.name)
