"""The batch that a training step receives."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from lightning_peft.data.top_tokens import TopTokens

IGNORED_LABEL = -100


class SourceOf(NamedTuple):
    """The source of the rows of a batch, among all that are validated on."""

    name: str
    names: tuple[str, ...]


@dataclass
class Batch:
    """One micro batch: B rows of T tokens, each row one sample or several packed ones, padded on the right.

    There is no attention mask. Attention is causal inside each sample; padding continues the last sample of its row,
    where nothing real can see it and its label is -100. Lightning moves the tensors of a dataclass to the device.
    """

    input_ids: Tensor
    """(B, T) int64."""
    labels: Tensor
    """(B, T) int64, not shifted: the token itself where it is trained, else -100. The first token of each sample is
    -100, so a loss that predicts position t from t - 1 never predicts across two samples."""
    position_ids: Tensor
    """(B, T) int64, restarting at 0 for each sample."""
    cu_seqlens: Tensor
    """(S + 1,) int32 in host memory when collated: where the S samples begin in the flattened B*T tokens, then B*T.
    Each row begins a sample."""
    max_seqlen: int
    """Longest sample in tokens, its padding included."""
    num_tokens: int
    """Tokens that are not padding."""
    num_supervised: int
    """Labels that are not -100."""
    weights: Tensor | None = None
    """(B, T) fp32, the factor of each label's loss; None where all are 1."""
    weight_sum: float | None = None
    """Sum of `weights` over the labels that are not -100; None without weights."""
    lengths: Tensor | None = None
    """(S,) int64, the tokens of each sample without its padding; None where that is not known."""
    sample_ids: Tensor | None = None
    """(S,) int64, the number of each sample in the batch it was taken from; None where they are counted as they are."""

    standings: Tensor | None = None
    """(S,) uint8, the `Standing` of each sample; None where none has one."""
    num_units: int | None = None
    """Pairs of samples that belong together, which follow each other; 0 in a filler, None where samples stand alone."""

    margins: Tensor | None = None
    """(U,) fp32, the lead that the chosen answer of each pair is to have; None where all are 0."""

    taught: "Batch | None" = None
    """The samples that a teacher reads in place of these: as many, in their order, the same tokens supervised."""

    top: TopTokens | None = None
    """The kept output of a teacher at the supervised tokens; None where a teacher runs in every step, or none does."""

    source: SourceOf | None = None
    """The source of the samples, in the validation of a mixture; None where it does not matter."""

    origins: tuple[str, ...] = ()
    """The places of the rows of the samples, each once, as in rows.jsonl line 3; empty in a filler."""

    @property
    def ends(self) -> Tensor:
        """Return where the last token of each sample is in the flattened tokens, (S,) int64; `lengths` are known."""
        assert self.lengths is not None
        return self.cu_seqlens[:-1] + self.lengths - 1

    @property
    def loss_weight(self) -> float:
        """Return the divisor of the summed loss: the number of labels, each counted by its weight."""
        return self.num_supervised if self.weight_sum is None else self.weight_sum
