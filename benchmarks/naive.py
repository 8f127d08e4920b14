"""The step as the formulas are written, to measure what ours saves."""

import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor

from lightning_peft.adapters.lora import LoRALinear
from lightning_peft.data.batch import Batch
from lightning_peft.objectives.model_loss import decoder_inputs
from lightning_peft.objectives.sft import SupervisedLoss


def plain_adapter(self: LoRALinear, x: Tensor) -> Tensor:
    """Return W x + scaling * B A x, every product kept for the backward pass."""
    return self.base_layer(x) + self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype))).to(x.dtype) * self.scaling


def plain_loss(self: SupervisedLoss, batch: Batch) -> Tensor:
    """Return the loss from the logits of all tokens at once."""
    hidden = self.model.base_model(**decoder_inputs(self.model, batch)).last_hidden_state
    logits = self.model.get_output_embeddings()(hidden).float()
    labels = F.pad(batch.labels[:, 1:], (0, 1), value=-100)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


class PlainFormulas(Callback):
    """Replaces parts of the step in this process: loss, adapter."""

    def __init__(self, parts: list[str]):
        if "loss" in parts:
            SupervisedLoss.forward = plain_loss  # type: ignore[method-assign]
        if "adapter" in parts:
            LoRALinear.forward = plain_adapter  # type: ignore[method-assign, assignment]
