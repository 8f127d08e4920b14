"""llama.cpp's names and layout of a model's tensors: the families whose conversion is that and no more."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lightning_peft.models.gguf_conversion import halves_from_pairs, pairs_from_halves

FAMILIES = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "gemma": "GEMMA",
    "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3",
    "phi3": "PHI3",
    "smollm3": "SMOLLM3",
    "granite": "GRANITE",
    "mixtral": "LLAMA",
    "qwen3_moe": "QWEN3MOE",
    "gpt_oss": "GPT_OSS",
    "olmo": "OLMO",
    "olmo2": "OLMO2",
    "olmo3": "OLMO2",
    "starcoder2": "STARCODER2",
    "stablelm": "STABLELM",
    "cohere": "COMMAND_R",
    "cohere2": "COHERE2",
    "glm4": "GLM4",
}
"""transformers' model type: llama.cpp's architecture."""
PERMUTED = ("llama", "mistral", "smollm3", "granite", "mixtral", "olmo")
"""Model types whose rows of q and k llama.cpp interleaves."""


class GGUFNames:
    """The names of one model's tensors in a GGUF file. Raises ValueError for a family that is not in `FAMILIES`."""

    def __init__(self, model: PreTrainedModel):
        from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map  # only GGUF files need the package

        config: Any = model.config
        if config.model_type not in FAMILIES:
            raise ValueError(
                f"format=gguf_lora: llama.cpp's layout of {config.model_type} is not known here; these are: "
                f"{', '.join(FAMILIES)}. format=plain and llama.cpp's convert_lora_to_gguf.py do it"
            )
        architecture = MODEL_ARCH[FAMILIES[config.model_type]]
        self.architecture: str = MODEL_ARCH_NAMES[architecture]
        self.names = get_tensor_name_map(architecture, config.num_hidden_layers)
        self.heads: dict[str, int] = {}
        if config.model_type in PERMUTED:
            self.heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    def of(self, name: str) -> str:
        """Return llama.cpp's name of a parameter."""
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"format=gguf_lora: llama.cpp has no tensor for {name}")
        return str(found)

    def laid_out(self, name: str, tensor: Tensor) -> Tensor:
        """Return a weight, a bias or a B as llama.cpp orders its rows."""
        heads = self._heads(name)
        return tensor if heads is None else pairs_from_halves(tensor, heads)

    def ours(self, name: str, tensor: Tensor) -> Tensor:
        """Undo `laid_out`."""
        heads = self._heads(name)
        return tensor if heads is None else halves_from_pairs(tensor, heads)

    def _heads(self, name: str) -> int | None:
        return next((self.heads[part] for part in name.split(".") if part in self.heads), None)
