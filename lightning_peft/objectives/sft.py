"""Supervised fine-tuning: the summed next-token cross entropy of a batch under a causal language model."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_peft.data.batch import Batch
from lightning_peft.objectives.linear_cross_entropy import LogitTransform, linear_cross_entropy


def logit_transform(model: PreTrainedModel) -> LogitTransform | None:
    """What a model family does to its logits after the head: Gemma's softcap, Cohere's and Granite's scales."""
    config = model.config.get_text_config()
    if cap := getattr(config, "final_logit_softcapping", None):
        return lambda logits: cap * torch.tanh(logits / cap)
    if scale := getattr(config, "logit_scale", None):
        return lambda logits: logits * scale
    if divisor := getattr(config, "logits_scaling", None):
        return lambda logits: logits / divisor
    return None


def decoder_inputs(batch: Batch) -> dict[str, Any]:
    """Keyword arguments with which a decoder keeps the packed samples of a batch apart."""
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "use_cache": False,
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
        "max_length_q": batch.max_seqlen,
        "max_length_k": batch.max_seqlen,
    }


class SupervisedLoss(nn.Module):
    """Model and loss in one forward, so that a sharded model's head is gathered when the loss reads it."""

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.transform = logit_transform(model)

    def forward(self, batch: Batch) -> Tensor:
        """Loss summed over the batch's `num_supervised` tokens, each times its weight, fp32 scalar.

        Position t is scored on the label at t + 1; a packed sample's first label is -100, so none predicts the next.
        """
        hidden = self.model.base_model(**decoder_inputs(batch)).last_hidden_state
        next_labels = F.pad(batch.labels[:, 1:], (0, 1), value=-100).reshape(-1)
        # The count is known from the collation, so the device is not asked for it.
        positions = torch.nonzero_static(next_labels != -100, size=batch.num_supervised).squeeze(1)
        weights = None
        if batch.weights is not None:
            weights = F.pad(batch.weights[:, 1:], (0, 1)).reshape(-1).index_select(0, positions)
        return linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions),
            next_labels.index_select(0, positions),
            self.model.get_output_embeddings(),
            self.model.config.get_text_config().vocab_size,
            self.transform,
            weights,
        )
