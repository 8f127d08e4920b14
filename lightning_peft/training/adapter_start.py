"""The start of adapters that read more than their own layer: weights before quantisation, activations, gradients."""

import logging
from collections.abc import Callable

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from transformers import PreTrainedModel

from lightning_peft.adapters.base import AdapterConfig
from lightning_peft.adapters.eva import initialize_from_activations
from lightning_peft.adapters.initialization import Reads, initialize_from_weights
from lightning_peft.adapters.inject import adapters
from lightning_peft.adapters.method import Selection
from lightning_peft.adapters.registry import METHODS
from lightning_peft.data.batch import Batch
from lightning_peft.distributed import rank, world_size
from lightning_peft.models.loading import load_model
from lightning_peft.models.source import ModelConfig
from lightning_peft.objectives.model_loss import ModelLoss, decoder_inputs
from lightning_peft.quantization.config import QuantizationConfig
from lightning_peft.quantization.weights import dense_weight

INIT_BATCHES = 4
"""Micro batches whose activations an initialisation looks at."""

FirstBatches = Callable[[int], list[Batch]]
"""The first so many micro batches of an epoch, of all ranks together."""

logger = logging.getLogger(__name__)


def reads_whole_model(adapter: AdapterConfig, quantization: QuantizationConfig) -> bool:
    """Return whether the adapters start from more than their own layer: weights before quantisation, or activations."""
    reads = adapter.initialization.reads
    chooses = METHODS[adapter.method].select is not None
    return chooses or reads is Reads.activations or (reads is not Reads.shape and quantization.is_on)


def chosen_in_full(
    objective: ModelLoss, adapter: AdapterConfig, first_batches: FirstBatches | None, sums_on: torch.device
) -> Selection:
    """Return the modules that a method's `select` chooses to train in full, by the gradients of the first batches.

    Each rank takes its share of these; their sums are taken on the device `sums_on`. Raises ValueError without data.
    """
    select = METHODS[adapter.method].select
    assert select is not None, "this method chooses no modules"
    if first_batches is None:
        raise ValueError(f"method={adapter.method} looks at gradients: call trainer.fit with datamodule=")
    count = adapter.probe_batches  # type: ignore[attr-defined]  # an option of those that choose

    def loss_of(batch: Batch) -> Callable[[], Tensor]:
        moved = move_data_to_device(batch, objective.model.device)
        return lambda: objective(moved) / max(objective.loss_weight(moved), 1.0)

    own_share = first_batches(count)[rank() :: world_size()]
    return select(objective.model, adapter, map(loss_of, own_share), sums_on)


def start_adapters(
    model: PreTrainedModel,
    adapter: AdapterConfig,
    base: ModelConfig,
    dtype: torch.dtype,
    quantization: QuantizationConfig,
    first_batches: FirstBatches | None,
) -> None:
    """Run an initialisation that reads more than its layer, on the adapters of `model`.

    Where it reads weights and these are quantised, `base` is loaded once more in `dtype` as it was before. Raises
    ValueError where it reads activations and there is no data.
    """
    init, reads = adapter.init_name, adapter.initialization.reads
    if reads in (Reads.weight, Reads.quantisation_error) and quantization.is_on:
        logger.info("adapter.init=%s: reading the weights before quantisation as well", init)
        dense = load_model(base, dtype)
        initialize_from_weights(dict(adapters(model)), lambda name: dense_weight(dense.get_submodule(name)))
    if reads is Reads.activations:
        if first_batches is None:
            raise ValueError(f"adapter.init={init} looks at activations: call trainer.fit with datamodule=")
        batches = [move_data_to_device(batch, model.device) for batch in first_batches(INIT_BATCHES)]
        ranks = initialize_from_activations(
            model, (decoder_inputs(model, batch) for batch in batches), adapter.rank_growth
        )
        logger.info("adapter.init=%s: ranks %d to %d", init, min(ranks.values()), max(ranks.values()))
