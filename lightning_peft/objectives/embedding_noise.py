"""NEFTune: uniform noise on the embeddings while training (Jain et al. 2023, arXiv:2310.05914)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_peft.data.batch import IGNORED_LABEL, Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # a start that trains nothing does without it


@contextmanager
def noisy_embeddings(model: "PreTrainedModel", batch: Batch, alpha: float) -> Iterator[None]:
    """Add noise to the model's embeddings of this batch: uniform in +-alpha / sqrt(L d) for a sample of L tokens.

    The noise lasts as long as the block. It is drawn from torch's own generator, seeded anew for every batch.
    """
    with changed_embeddings(model, lambda embedded: with_noise(embedded, batch, alpha)):
        yield


@contextmanager
def changed_embeddings(model: "PreTrainedModel", change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Have the model go on with what `change` makes of its embeddings, (B, T, D), inside the block."""

    def changed(module: nn.Module, inputs: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
        return change(embedded)

    hook = model.get_input_embeddings().register_forward_hook(changed)
    try:
        yield
    finally:
        hook.remove()


def with_noise(embedded: Tensor, batch: Batch, alpha: float) -> Tensor:
    """Return the embeddings of a batch, (B, T, D), with noise of this size; as many numbers are drawn for it."""
    lengths = sample_lengths(batch).to(embedded.device).float()
    size = alpha / (lengths * embedded.shape[-1]).sqrt()
    noise = torch.empty(embedded.shape, device=embedded.device).uniform_(-1, 1)
    return embedded + (size[..., None] * noise).to(embedded.dtype)


def sample_lengths(batch: Batch) -> Tensor:
    """Return for each token (B, T) the length of its sample up to the last label, int64; 1 for one without a label.

    No loss sees the tokens behind the last label; the padding is among them, and depends on how rows are packed.
    """
    bounds = batch.cu_seqlens[1:].to(batch.labels.device, torch.int64)
    places = torch.arange(batch.labels.numel(), device=batch.labels.device)
    samples = torch.searchsorted(bounds, places, right=True)
    labelled = batch.labels.flatten() != IGNORED_LABEL
    ends = torch.where(labelled, batch.position_ids.flatten() + 1, 1)
    lengths = ends.new_ones(len(bounds)).scatter_reduce(0, samples, ends, "amax")
    return lengths.index_select(0, samples).view_as(batch.labels)
