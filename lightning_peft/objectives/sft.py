"""Supervised fine-tuning: the summed next-token cross entropy of a batch under a causal language model."""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_peft import distributed
from lightning_peft.data.batch import Batch
from lightning_peft.kernels.cross_entropy import weighted_sum
from lightning_peft.models.attention import VARLEN
from lightning_peft.models.blocks import decoder_of
from lightning_peft.objectives.linear_cross_entropy import linear_cross_entropy
from lightning_peft.objectives.logits import (
    PROBED_TOKENS,
    LogitPath,
    find_logit_path,
    in_eval_mode,
    own_inputs,
    relative_difference,
    tolerance,
)

logger = logging.getLogger(__name__)

PACKED_IN_16_BITS = 2**-3
"""Difference of packed logits that rounding explains in deep models: samples that see each other differ by more."""


def decoder_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """Keyword arguments with which a decoder keeps the packed samples of a batch apart.

    Where samples begin is said only where a row holds several, or to the attention that goes by it: a decoder that
    cannot keep samples apart must not be told that there are some.
    """
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    rows = batch.input_ids.shape[0]
    if batch.cu_seqlens.numel() - 1 == rows and model.config._attn_implementation != VARLEN:
        return inputs
    return inputs | {
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
        "max_length_q": batch.max_seqlen,
        "max_length_k": batch.max_seqlen,
    }


def first_pair(batch: Batch) -> list[Tensor]:
    """The first tokens of the first two samples of a row, if one of the rows holds two."""
    rows, width = batch.input_ids.shape
    bounds = batch.cu_seqlens.tolist()
    if len(bounds) - 1 == rows:
        return []
    samples = list(zip(bounds[:-1], bounds[1:], strict=True))
    index = next(i for i in range(len(samples) - 1) if samples[i][0] // width == samples[i + 1][0] // width)
    flat = batch.input_ids.flatten()
    return [flat[start : min(stop, start + PROBED_TOKENS)] for start, stop in samples[index : index + 2]]


class SupervisedLoss(nn.Module):
    """Model and loss in one forward, so that a sharded model's head is gathered when the loss reads it.

    The first forward checks how the model makes its logits. Where that is not rebuilt here, the loss is the cross
    entropy of the model's own.
    """

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.logit_path: LogitPath | None = None
        """How logits come of hidden states; None before the first forward, and where the model's own are taken."""
        self.is_checked = False
        self.packing_difference: float | None = None
        """What the check found for packed samples; None before it, and without any."""

    def assume(self, path: LogitPath) -> None:
        """Take this path unchecked, for a model without values."""
        self.logit_path, self.is_checked = path, True

    def check(self, batch: Batch) -> None:
        """See on the batch's first tokens how the model makes its logits, and whether packed samples stay apart.

        The first forward does it by itself. Raises RuntimeError where packed samples see each other.
        """
        pair = first_pair(batch)
        # Every rank runs the model equally often: blocks of a sharded one are gathered from all.
        if distributed.worst(float(not pair)) == 0:
            self.packing_difference = self._compare_packed(*pair)
        self.logit_path = find_logit_path(self.model, batch.input_ids, self._row_inputs)
        self.is_checked = True

    @torch.no_grad()
    def _compare_packed(self, first: Tensor, second: Tensor) -> float:
        """Difference of the second sample's logits, packed behind the first one, to those it has alone."""
        lengths = torch.tensor([0, len(first), len(second)])
        bounds = lengths.cumsum(0).to(device=first.device, dtype=torch.int32)
        places = torch.cat([torch.arange(len(ids), device=ids.device) for ids in (first, second)])[None]
        ids = torch.cat([first, second])[None]
        packed = decoder_inputs(self.model, Batch(ids, ids, places, bounds, int(lengths.max()), ids.numel(), 0))
        with in_eval_mode(self.model):
            together = self.model(**packed).logits[0, len(first) :]
            alone = self.model(**own_inputs(second[None])).logits[0]
        difference = float(relative_difference(together, alone))
        if difference > (tolerance(alone.dtype) if alone.dtype is torch.float32 else PACKED_IN_16_BITS):
            raise RuntimeError(
                f"packed samples see each other in {type(self.model).__name__} with "
                f"model.attention={self.model.config._attn_implementation}: logits differ by {difference:.1%}; "
                "use data.packing=false"
            )
        logger.info("packing: a sample's logits differ from those it has alone by %.1e of the largest", difference)
        return difference

    def forward(self, batch: Batch) -> Tensor:
        """Loss summed over the batch's `num_supervised` tokens, each times its weight, fp32 scalar.

        Position t is scored on the label at t + 1; a packed sample's first label is -100, so none predicts the next.
        """
        if not self.is_checked:
            self.check(batch)
        next_labels = F.pad(batch.labels[:, 1:], (0, 1), value=-100).reshape(-1)
        # The count is known from the collation, so the device is not asked for it.
        positions = torch.nonzero_static(next_labels != -100, size=batch.num_supervised).squeeze(1)
        labels = next_labels.index_select(0, positions)
        weights = None
        if batch.weights is not None:
            weights = F.pad(batch.weights[:, 1:], (0, 1)).reshape(-1).index_select(0, positions)
        if self.logit_path is None:
            packed = batch.cu_seqlens.numel() - 1 > batch.input_ids.shape[0]
            inputs = decoder_inputs(self.model, batch) if packed else own_inputs(batch.input_ids)
            logits = self.model(**inputs).logits
            chosen = logits.reshape(-1, logits.shape[-1]).index_select(0, positions)
            return weighted_sum(F.cross_entropy(chosen.float(), labels, reduction="none"), weights)
        hidden = decoder_of(self.model)(**decoder_inputs(self.model, batch)).last_hidden_state
        chosen = hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions)
        return linear_cross_entropy(
            chosen if self.logit_path.scaled is None else self.logit_path.scaled(chosen),
            labels,
            self.model.get_output_embeddings(),
            self.model.config.get_text_config().vocab_size,
            self.logit_path.transform,
            weights,
        )

    def _row_inputs(self, ids: Tensor) -> dict[str, Any]:
        """The decoder's arguments for rows of ids (B, T) that are one sample each."""
        rows, width = ids.shape
        bounds = torch.arange(0, (rows + 1) * width, width, dtype=torch.int32, device=ids.device)
        places = torch.arange(width, device=ids.device).expand(rows, width)
        return decoder_inputs(self.model, Batch(ids, ids, places, bounds, width, ids.numel(), 0))
