"""The parts of a multimodal model that see and hear: left on disk, as training reads text, and saved back unchanged."""

import json
import logging
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from lightning_peft.models.source import INDEX_NAME, SAFETENSORS
from lightning_peft.models.weight_files import source_of_files

logger = logging.getLogger(__name__)


class LeftOnDisk(nn.Module):
    """The place of a part whose weights are not read. Raises RuntimeError where the model calls it."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.kind = type(part).__name__
        self.names = list(part.state_dict())
        """Names of its weights below its own."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        raise RuntimeError(f"{self.kind} is left on disk: models are run on text alone here")


def leave_on_disk(model: PreTrainedModel) -> None:
    """Put places without weights for the towers of a multimodal model that do not read text; any other stays whole.

    A tower is a model of its own inside the model, as transformers builds vision and sound; projectors between a tower
    and the text stay.
    """
    embedding = model.get_input_embeddings()
    towers: list[str] = []
    for name, part in list(model.named_modules()):
        is_inside = any(name.startswith(f"{tower}.") for tower in towers)
        if isinstance(part, PreTrainedModel) and not is_inside and all(m is not embedding for m in part.modules()):
            model.set_submodule(name, LeftOnDisk(part))
            towers.append(name)


def names_left(model: nn.Module) -> set[str]:
    """Return the names of the weights that are left on disk, as the model's state would have them."""
    return {
        f"{name}.{own}" for name, part in model.named_modules() if isinstance(part, LeftOnDisk) for own in part.names
    }


def remember_files(model: nn.Module, files: dict[str, Path]) -> None:
    """Note the file of each key of the checkpoint that is left, for `save_left`."""
    kinds = sorted({part.kind for part in model.modules() if isinstance(part, LeftOnDisk)})
    logger.info("%d tensors of %s stay on disk: text alone is trained", len(files), " and ".join(kinds))
    model.left_on_disk = files  # type: ignore[assignment]


def save_left(model: nn.Module, folder: Path) -> None:
    """Add the tensors that were left on disk to a saved model, by the checkpoint's names and bit for bit."""
    left: dict[str, Path] = getattr(model, "left_on_disk", {})
    if not left:
        return
    index = _index(folder)
    by_file: dict[Path, list[str]] = {}
    for key, path in left.items():
        by_file.setdefault(path, []).append(key)
    for number, (path, keys) in enumerate(by_file.items(), 1):
        name = f"model-unchanged-{number:05}-of-{len(by_file):05}.safetensors"
        source = source_of_files([path])
        tensors = {key: source.read(key, None) for key in keys}
        save_file(tensors, folder / name, {"format": "pt"})
        index["weight_map"] |= dict.fromkeys(keys, name)
        index["metadata"]["total_size"] += sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2))
    logger.info("%s: %d tensors of vision or sound as in the base", folder, len(left))


def _index(folder: Path) -> dict[str, Any]:
    """Return the index of a saved model; a single file becomes the first shard of several."""
    path = folder / INDEX_NAME
    if path.is_file():
        return dict(json.loads(path.read_text()))
    first = folder / "model-00001-of-00001.safetensors"
    (folder / SAFETENSORS).rename(first)
    with safe_open(first, framework="pt", device="cpu") as file:
        names = list(file.keys())
        size = sum(file.get_tensor(name).nbytes for name in names)
    return {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(names, first.name)}
