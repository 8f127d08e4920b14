"""Adapters as HF PEFT writes them."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


def save_changed(base: Path, config: LoraConfig, into: Path) -> PeftModel:
    """Put an adapter around the model in a folder, change all that it trains, and save it; return it."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(into)
    return model
