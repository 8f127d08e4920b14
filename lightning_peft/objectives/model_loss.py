"""A causal language model and the loss on it: what every objective stands on.

The primitive is the loss of each supervised token, by chunks of the output head, with a gradient of its own. Their sum
is supervised fine-tuning; their sums per sample are log-probabilities of answers.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft import distributed
from lightning_peft.adapters.inject import telling_own_tokens
from lightning_peft.data.batch import Batch
from lightning_peft.models.blocks import decoder_of
from lightning_peft.models.rope import follows_length
from lightning_peft.models.source import VARLEN
from lightning_peft.objectives.embedding_noise import noisy_embeddings, sample_lengths
from lightning_peft.objectives.linear_cross_entropy import Readout
from lightning_peft.objectives.logits import (
    PROBED_TOKENS,
    LogitPath,
    find_logit_path,
    in_eval_mode,
    own_inputs,
    refuse_foresight,
    relative_difference,
    rounded_in,
    tolerance,
    warn_of_own_loss,
)
from lightning_peft.objectives.unpacking import is_packed, unpacked

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # a start that trains nothing does without it

logger = logging.getLogger(__name__)

PACKED_IN_16_BITS = 2**-3
"""Difference of packed logits that rounding explains in deep models: samples that see each other differ by more."""

NEXT_TOKENS = 3
"""Tokens behind the end of another sample that are compared by themselves."""


def decoder_inputs(model: "PreTrainedModel", batch: Batch) -> dict[str, Any]:
    """Return the keyword arguments with which a decoder keeps the packed samples of a batch apart.

    The beginnings of samples are passed only where a row holds several, or to the attention that goes by them: a
    decoder that cannot keep samples apart must not be told that there are some.
    """
    inputs = {"input_ids": batch.input_ids, "position_ids": row_positions(model, batch), "use_cache": False}
    if not is_packed(batch) and model.config._attn_implementation != VARLEN:
        return inputs
    return inputs | {
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
        "max_length_q": batch.max_seqlen,
        "max_length_k": batch.max_seqlen,
    }


def row_positions(model: "PreTrainedModel", batch: Batch) -> Tensor:
    """Return the positions (B, T) of a batch; padding has none of its own where the last one sets the frequencies."""
    if batch.lengths is None or is_packed(batch) or not follows_length(model.config, None):
        return batch.position_ids
    last = batch.lengths.to(batch.position_ids.device)[:, None] - 1
    return torch.minimum(batch.position_ids, last)


class TokenLosses(NamedTuple):
    """The supervised tokens of a batch, N of them, in the order of its samples, however they are run."""

    losses: Tensor
    """(N,) fp32, minus the log-probability of each."""
    samples: Tensor
    """(N,) int64, the sample each belongs to, counted through the batch."""
    weights: Tensor | None
    """(N,) fp32, the factor of each; None where all are 1."""


def _joined(parts: Sequence[Tensor], order: Tensor | None = None) -> Tensor:
    joined = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return joined if order is None else joined.index_select(0, order)


class ModelLoss(nn.Module, ABC):
    """Model and loss in one forward, so that a sharded model's head is gathered when the loss reads it.

    The first forward checks how the model makes its logits, and whether it keeps packed samples apart. Where the
    logits are not rebuilt here, the loss is the cross entropy of the model's own; where samples are not kept apart,
    each is run as a row of its own.
    """

    model: "PreTrainedModel"
    label_smoothing: float = 0.0
    """Share of a label's probability that all tokens get, while training."""
    noise_alpha: float = 0.0
    """Size of the noise on the embeddings while training (`embedding_noise`); 0 adds none."""

    def __init__(self, model: "PreTrainedModel", packing: bool | str = "auto"):
        """Take packing, `data.packing`: with true, a model that does not keep packed samples apart is refused."""
        super().__init__()
        self.model = model
        self.packing = packing
        self.logit_path: LogitPath | None = None
        """The path from hidden states to logits; None before the first forward, and where the model's own are taken."""
        self.is_checked = False
        self.packing_difference: float | None = None
        """The check's finding for packed samples; None before the check, and where none are packed."""
        self.runs_apart = False
        """True where packed samples are run as rows of their own, because the check found that they see each other."""
        self.measured: dict[str, tuple[Tensor, Tensor]] = {}
        """Measurements of the last forward beside the loss: sum and count over the batch, fp32 scalars, by name."""

    @abstractmethod
    def forward(self, batch: Batch) -> Tensor:
        """Return the loss summed over the batch, fp32 scalar; `loss_weight` says what the sum is divided by."""

    def loss_weight(self, batch: Batch) -> float:
        """Return what the loss of a batch counts: its supervised tokens, or for pairs their number."""
        return batch.loss_weight

    def after_step(self, measured: dict[str, Tensor]) -> None:
        """Take note of what was measured over a whole optimiser step and all ranks, fp64 scalars by name."""

    def step_state(self) -> dict[str, Tensor]:
        """Return what `after_step` keeps, for a checkpoint."""
        return {}

    def load_step_state(self, state: dict[str, Tensor]) -> None:
        """Go on from the state of a checkpoint."""

    def assume(self, path: LogitPath) -> None:
        """Take this path unchecked, for a model without values."""
        self.logit_path, self.is_checked = path, True

    def check(self, batch: Batch) -> None:
        """See on the batch's first tokens how the model makes its logits, and whether packed samples stay apart.

        The first forward does it by itself. Raises ValueError where the model sees the tokens it is to predict, and
        where packed samples see each other with data.packing=true.
        """
        self.check_samples(batch)
        if self.model.training:  # evaluation has nothing to leave out
            warn_of_own_loss(self.model, batch.input_ids)
        self.logit_path = find_logit_path(self.model, batch.input_ids, self._row_inputs)
        self.is_checked = True

    def check_samples(self, batch: Batch) -> None:
        """See on the batch's first tokens whether packed samples stay apart, and whether the model is causal."""
        # The import is of transformers' models, which a start that trains nothing does without.
        from lightning_peft.models.attention import supports_packing

        refuse_foresight(self.model, batch.input_ids)
        row = batch.input_ids[0, : 2 * PROBED_TOKENS]
        # Every rank runs the model equally often: blocks of a sharded one are gathered from all.
        if self.packing is not False and supports_packing(self.model) and len(row) > 1:
            self._check_packing(row[: -(-len(row) // 3)], row[-(-len(row) // 3) :])

    def _check_packing(self, first: Tensor, second: Tensor) -> None:
        difference, dtype = self._compare_packed(first, second)
        self.packing_difference = difference = distributed.worst(difference)
        if difference <= (tolerance(dtype) if dtype is torch.float32 else PACKED_IN_16_BITS):
            level = logging.INFO if self.model.training else logging.DEBUG  # evaluation asks base and adapter each
            text = "packing: a sample's logits differ from those it has alone by %.1e of the largest"
            logger.log(level, text, difference)
            return
        found = (
            f"packed samples see each other in {type(self.model).__name__} with "
            f"model.attention={self.model.config._attn_implementation}: logits differ by {difference:.1%}"
        )
        if self.packing is True:
            raise ValueError(f"data.packing=true: {found}; use data.packing=auto")
        logger.warning("%s; each is run as a padded row of its own", found)
        self.runs_apart = True

    @torch.no_grad()
    def _compare_packed(self, first: Tensor, second: Tensor) -> tuple[float, torch.dtype]:
        """Return the second sample's difference in logits, packed behind the first or alone; and the logits' dtype."""
        lengths = torch.tensor([0, len(first), len(second)])
        bounds = lengths.cumsum(0).to(device=first.device, dtype=torch.int32)
        places = torch.cat([torch.arange(len(ids), device=ids.device) for ids in (first, second)])[None]
        ids = torch.cat([first, second])[None]
        packed = decoder_inputs(self.model, Batch(ids, ids, places, bounds, int(lengths.max()), ids.numel(), 0))
        with in_eval_mode(self.model):
            together = self.model(**packed).logits[0, len(first) :]
            alone = self.model(**own_inputs(second[None])).logits[0]
        behind = slice(0, NEXT_TOKENS)  # a window or a convolution looks no further back than a few tokens
        differences = relative_difference(together, alone), relative_difference(together[behind], alone[behind])
        return float(torch.stack(differences).max()), rounded_in(alone)

    def token_losses(self, batch: Batch) -> TokenLosses:
        """Return the cross entropy of every supervised token; the first call checks the model.

        Position t is scored on the label at t + 1; a packed sample's first label is -100, so none predicts the next.
        """
        readout = self.readout(batch)
        return TokenLosses(readout.losses(), readout.samples, readout.weights)

    def token_logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the logits (N, V) of every supervised token and the tokens (N,), all at once; a call may check first.

        They are what `token_losses` takes the cross entropy of, for those who need the whole distribution.
        """
        readout = self.readout(batch)
        if self.logit_path is None:
            return readout.hidden, readout.labels
        logits = readout.head(readout.hidden)[:, : readout.vocabulary]
        return (logits if readout.transform is None else readout.transform(logits)), readout.labels

    def readout(self, batch: Batch) -> Readout:
        """Return the hidden states of every supervised token with what makes logits of them; a call may check first."""
        if not self.is_checked:
            self.check(batch)
        parts = self._parts(batch)
        hidden, labels, samples, weights = zip(*(self._read(part) for part in parts), strict=True)
        numbers = _joined(samples)
        # Samples of their own rows come by their lengths, which are others in the batch of a teacher.
        order = None if parts[0].sample_ids is None else numbers.argsort(stable=True)
        path, head = self.logit_path, self.model.get_output_embeddings()
        return Readout(
            _joined(hidden, order),
            nn.Identity() if path is None else head,
            None if path is None else path.transform,
            _joined(labels, order),
            numbers if order is None else numbers.index_select(0, order),
            None if batch.weights is None else _joined(weights, order),
            self.model.config.get_text_config().vocab_size,
            self.label_smoothing if self.training else 0.0,
        )

    def _parts(self, batch: Batch) -> list[Batch]:
        """Return what is run together: the batch, or its samples where they would see each other."""
        sees_others = self.runs_apart or follows_length(self.model.config, batch.max_seqlen)
        if not sees_others or not is_packed(batch):
            return [batch]
        # The import is of sharding, which a start that trains nothing does without.
        from torch.distributed.fsdp import FSDPModule

        # Blocks of a sharded model are gathered from all ranks: each runs it once, whatever its samples.
        return list(unpacked(batch, at_once=any(isinstance(module, FSDPModule) for module in self.model.modules())))

    def sums_per_sample(self, batch: Batch, tokens: TokenLosses) -> tuple[Tensor, Tensor]:
        """Return the log-probability of each sample's supervised tokens, and their number, (S,) fp32 each."""
        zeros = tokens.losses.new_zeros(batch.cu_seqlens.numel() - 1)
        counts = zeros.index_add(0, tokens.samples, torch.ones_like(tokens.losses))
        return -zeros.index_add(0, tokens.samples, tokens.losses), counts

    def _supervised(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return where the next token is supervised, (N,) in the flattened batch, and those tokens (N,)."""
        next_labels = F.pad(batch.labels[:, 1:], (0, 1), value=-100).reshape(-1)
        # The count is known from the collation, so the device is not asked for it.
        positions = torch.nonzero_static(next_labels != -100, size=batch.num_supervised).squeeze(1)
        return positions, next_labels.index_select(0, positions)

    def _read(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return what the head is fed (or logits where they are not rebuilt), tokens, samples and weights, (N, ...)."""
        positions, labels = self._supervised(batch)
        weights = None
        if batch.weights is not None:
            weights = F.pad(batch.weights[:, 1:], (0, 1)).reshape(-1).index_select(0, positions)
        bounds = batch.cu_seqlens[1:].to(positions.device, torch.int64)
        samples = torch.searchsorted(bounds, positions, right=True)
        if batch.sample_ids is not None:
            samples = batch.sample_ids.index_select(0, samples)
        path = self.logit_path
        hidden = self._own_logits(batch, positions) if path is None else self._hidden(batch, positions, path)
        return hidden, labels, samples, weights

    def _own_logits(self, batch: Batch, positions: Tensor) -> Tensor:
        """Return the model's own logits at these positions of the flattened batch, (N, V)."""
        inputs = decoder_inputs(self.model, batch) if is_packed(batch) else own_inputs(batch.input_ids)
        if follows_length(self.model.config, None):
            inputs["position_ids"] = row_positions(self.model, batch)
        with self._noise(batch), self._own_tokens(batch):
            logits = self.model(**inputs).logits
        return logits.reshape(-1, logits.shape[-1]).index_select(0, positions)

    def _hidden(self, batch: Batch, positions: Tensor, path: LogitPath) -> Tensor:
        """Return what the head is fed at these positions of the flattened batch, (N, D)."""
        inputs = own_inputs(batch.input_ids) if self.runs_apart else decoder_inputs(self.model, batch)
        with self._noise(batch), self._own_tokens(batch):
            hidden = decoder_of(self.model)(**inputs).last_hidden_state
        chosen = hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions)
        return chosen if path.scaled is None else path.scaled(chosen)

    def _noise(self, batch: Batch) -> AbstractContextManager[None]:
        if not self.noise_alpha or not self.training:
            return nullcontext()
        return noisy_embeddings(self.model, batch, self.noise_alpha)

    def _own_tokens(self, batch: Batch) -> AbstractContextManager[None]:
        """Return a context in which adapters that follow a whole sample know it up to its last label.

        Packing and padding change nothing of what they know.
        """
        return telling_own_tokens(self.model, lambda: batch.position_ids < sample_lengths(batch))

    def _row_inputs(self, ids: Tensor) -> dict[str, Any]:
        """Return the decoder's arguments for rows of ids (B, T) that are one sample each."""
        rows, width = ids.shape
        bounds = torch.arange(0, (rows + 1) * width, width, dtype=torch.int32, device=ids.device)
        places = torch.arange(width, device=ids.device).expand(rows, width)
        return decoder_inputs(self.model, Batch(ids, ids, places, bounds, width, ids.numel(), 0))
