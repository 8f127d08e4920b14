"""Check that HF PEFT, where it is installed, reads a folder as the adapter that it is."""

import importlib.util
import re
import warnings
from copy import deepcopy
from pathlib import Path

from transformers import AutoModelForSequenceClassification, PreTrainedModel

from lightning_peft.adapters.inject import adapters
from lightning_peft.adapters.layer_names import block_depth
from lightning_peft.adapters.lora import LoRAExperts
from lightning_peft.models.forwards import rescale_every
from lightning_peft.models.reward_head import reward_head
from lightning_peft.models.weight_streaming import parameters_on_meta
from lightning_peft.quantization.weights import never_calls

DIVIDED = ("attention.output", "feed_forward.value")
"""Layers whose weights RWKV divides in place for evaluation, in transformers 5.24."""


def objection_of_peft(folder: Path, model: PreTrainedModel) -> str | None:
    """Return in one line how HF PEFT fails to read the adapter of `folder` into a model like this one, without weights.

    The line is None where PEFT reads the adapter, and where PEFT is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        return None
    from peft import PeftModel  # takes seconds, and only this needs it
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with parameters_on_meta():
        if reward_head(model) is None:
            base = type(model)._from_config(config)
        else:
            config.num_labels = 1
            base = AutoModelForSequenceClassification.from_config(config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            theirs = PeftModel.from_pretrained(base, str(folder))
        except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
            return f"HF PEFT does not read it: {_one_line(error)[:160]}"
    adapted = {name for name, part in theirs.get_base_model().named_modules() if isinstance(part, BaseTunerLayer)}
    unread = [n for n, layer in adapters(model) if not isinstance(layer, LoRAExperts) and n not in adapted]
    if unread or any("missing adapter keys" in str(warning.message) for warning in caught):
        return f"HF PEFT finds no place for some of its tensors in {type(model).__name__}, and gives other outputs"
    parents = {name: model.get_submodule(name.rpartition(".")[0]) for name, _ in adapters(model)}
    if bypassed := [name for name, parent in parents.items() if never_calls(parent, name.rpartition(".")[2])]:
        return (
            f"HF PEFT leaves out the change of {bypassed[0]}, whose weight {type(model).__name__} multiplies with by "
            "itself, and gives other outputs"
        )
    every = rescale_every(model)
    if divided := [n for n in parents if every and n.endswith(DIVIDED) and (block_depth(n) or 0) >= every]:
        return (
            f"HF PEFT leaves {divided[0]}'s change as it is where {type(model).__name__} divides the weight for "
            "evaluation, and gives other outputs; rescale_every=0 in the base's config.json keeps the weight"
        )
    return None


def _one_line(error: BaseException) -> str:
    """Return what PEFT says, with the members of a set, which Python prints in any order, in one order."""
    text = " ".join(str(error).split())
    return re.sub(r"\{('[^{}]*')\}", lambda found: f"{{{', '.join(sorted(found[1].split(', ')))}}}", text)
