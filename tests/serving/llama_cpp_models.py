"""The files of llama.cpp's own converter for whole models, small ones: run once, kept as fields and checksums.

    python tests/serving/llama_cpp_models.py FOLDER_OF_LLAMA_CPP

This runs the classes of its `convert_hf_to_gguf.py`, without a tokenizer, and writes `llama_cpp_models.json` beside
this file.
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from families import FULL, OF_GGUF, SLIDES, small_model  # noqa: E402

from lightning_peft.models.gguf import GGUFFile  # noqa: E402
from lightning_peft.models.gguf_families import FAMILIES  # noqa: E402
from lightning_peft.models.tiny import tiny_tokenizer  # noqa: E402

FIXTURE = Path(__file__).with_name("llama_cpp_models.json")
CONVERT = """
import sys, pathlib
sys.path[:0] = [sys.argv[1] + "/gguf-py", sys.argv[1]]
import gguf
from conversion import get_model_class
from conversion.base import ModelBase, get_model_architecture, ModelType
for folder in map(pathlib.Path, sys.argv[2:]):
    kind = get_model_class(get_model_architecture(ModelBase.load_hparams(folder, False), ModelType.TEXT))
    kind.set_vocab = lambda self: None
    kind(folder, gguf.LlamaFileType.ALL_F32, folder / "model.gguf").write()
"""
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0], "original_max_position_embeddings": 16,
}  # fmt: skip
YARN_GLOBALLY = {
    FULL: {**YARN, "attention_factor": 1.138629436111989},
    SLIDES: {"rope_type": "default", "rope_theta": 1e4},
}
CASES: dict[str, dict[str, Any]] = {name: OF_GGUF.get(name, {}) for name in FAMILIES} | {
    "llama with scaled positions": {"rope_parameters": LLAMA_3},
    "qwen3 with scaled positions": {"rope_parameters": YARN, **OF_GGUF["qwen3"]},
    "granite with biases": {"attention_bias": True, "mlp_bias": True, **OF_GGUF["granite"]},
    "phi3 for long texts": {
        "rope_parameters": LONG, "original_max_position_embeddings": 16, **OF_GGUF["phi3"]
    },
    "phi3 that turns partly": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        **OF_GGUF["phi3"],
    },
    "olmo3 for long texts": {
        "rope_parameters": YARN_GLOBALLY, "num_hidden_layers": 4, "layer_types": [SLIDES, FULL, SLIDES, FULL]
    },
    "stablelm with biases": {"use_qkv_bias": True},
}  # fmt: skip
"""A family, what is special of its model, and the options that make it so."""


def case_model(case: str, **more: Any) -> PreTrainedModel:
    """Return a model of a case with weights that no random generator has to draw."""
    model = small_model(case.split()[0], vocab_size=320, **{**CASES[case], **more})
    start = 0
    with torch.no_grad():
        for parameter in model.parameters():
            numbers = torch.arange(parameter.numel(), dtype=torch.int64) + start
            start += parameter.numel()
            spread = (numbers * 7919 % 2003).float() / 1001.5 - 1
            scale = 0.35 if parameter.ndim > 1 else 0.5
            parameter.copy_((scale * spread).view(parameter.shape) + (parameter if parameter.ndim == 1 else 0))
    return model


def content(path: Path) -> dict[str, Any]:
    """Return the fields of the architecture, and each tensor's shape and checksum."""
    file = GGUFFile(path)
    prefix = f"{file.fields['general.architecture']}."
    tensors = {
        name: [list(entry.shape), entry.kind, hashlib.sha256(file.stored(name)).hexdigest()]
        for name, entry in file.tensors.items()
    }
    fields = {name: value for name, value in sorted(file.fields.items()) if name.startswith(prefix)}
    return {"fields": fields, "tensors": dict(sorted(tensors.items()))}


def main(llama_cpp: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(320 - len(tokenizer))])  # Gemma 3's is cut to the tokens
    with tempfile.TemporaryDirectory() as place:
        folders = {case: Path(place) / str(number) for number, case in enumerate(CASES)}
        for case, folder in folders.items():
            case_model(case).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        subprocess.run([sys.executable, "-c", CONVERT, str(llama_cpp), *map(str, folders.values())], check=True)
        found = {case: content(folder / "model.gguf") for case, folder in folders.items()}
    lines = re.sub(r"\n {4,}", " ", json.dumps(found, indent=1))
    FIXTURE.write_text(re.sub(r"\n {3}\]", "]", lines) + "\n")  # a tensor a line


if __name__ == "__main__":
    main(Path(sys.argv[1]))
