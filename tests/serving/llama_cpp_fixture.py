"""The files of llama.cpp's own converter for adapters that anyone can make again: run once, kept as checksums.

    python tests/serving/llama_cpp_fixture.py FOLDER_OF_LLAMA_CPP

This runs its `convert_lora_to_gguf.py` and writes `llama_cpp_lora.json` beside this file.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from families import small_model  # noqa: E402

from lightning_peft.adapters.inject import inject_adapters  # noqa: E402
from lightning_peft.adapters.lora import LoRAConfig  # noqa: E402
from lightning_peft.models.gguf import GGUFFile  # noqa: E402
from lightning_peft.models.gguf_families import FAMILIES  # noqa: E402
from lightning_peft.serving.plain import write_plain  # noqa: E402

FIXTURE = Path(__file__).with_name("llama_cpp_lora.json")
FIELDS = ("general.architecture", "general.type", "general.file_type", "adapter.type", "adapter.lora.alpha")
RANK = 3


def numbers(shape: tuple[int, ...], start: int) -> Tensor:
    """Return fp32 numbers between -1 and 1 that no random generator has to draw."""
    count = torch.arange(shape[0] * shape[1], dtype=torch.int64) + start
    return ((count * 7919 % 2003).float() / 1001.5 - 1).view(shape)


def model_and_pairs(family: str) -> tuple[PreTrainedModel, dict[str, tuple[Tensor, Tensor]]]:
    model = small_model(family)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}
    pairs = {
        name: (numbers((RANK, layer.in_features), 17 * i), numbers((layer.out_features, RANK), 31 * i + 5))
        for i, (name, layer) in enumerate(layers.items())
    }
    inject_adapters(model, LoRAConfig(rank=RANK, target_modules=list(pairs)))
    return model, pairs


def content(path: Path) -> dict[str, object]:
    file = GGUFFile(path)
    tensors = {
        name: [list(entry.shape), hashlib.sha256(file.stored(name)).hexdigest()] for name, entry in file.tensors.items()
    }
    return {"fields": {key: file.fields.get(key) for key in FIELDS}, "tensors": dict(sorted(tensors.items()))}


def main(llama_cpp: Path) -> None:
    found = {}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as place:
            base, adapter, output = Path(place) / "base", Path(place) / "adapter", Path(place) / "adapter.gguf"
            adapter.mkdir()
            model, pairs = model_and_pairs(family)
            small_model(family).config.save_pretrained(base)
            words = json.loads((base / "config.json").read_text())
            words["architectures"] = [type(model).__name__]
            (base / "config.json").write_text(json.dumps(words))
            write_plain(pairs, model, adapter, "base", None)
            convert = [sys.executable, str(llama_cpp / "convert_lora_to_gguf.py"), str(adapter), "--base", str(base)]
            subprocess.run([*convert, "--outfile", str(output)], check=True)
            found[family] = content(output)
    FIXTURE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
