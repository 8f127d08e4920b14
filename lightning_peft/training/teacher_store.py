"""A teacher that is run once over all rows, before training; what is kept of it stands beside their tokens."""

import hashlib
import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from numpy.lib.format import open_memmap
from torch import Tensor
from transformers import PreTrainedModel

from lightning_peft import distributed
from lightning_peft.checkpoint.lineage import installed_versions
from lightning_peft.data.batch import IGNORED_LABEL
from lightning_peft.data.cache import cache_folder
from lightning_peft.data.collate import collate
from lightning_peft.data.datamodule import SFTDataModule
from lightning_peft.data.token_store import Samples
from lightning_peft.data.top_tokens import IDS, LOG_PROBABILITIES, VOCABULARY
from lightning_peft.models.loading import empty_model, source_fingerprint
from lightning_peft.models.source import ModelConfig
from lightning_peft.objectives.distill import DistillConfig
from lightning_peft.objectives.linear_divergence import bucketed, final_logits, in_fp32
from lightning_peft.objectives.model_loss import Readout
from lightning_peft.objectives.sft import SupervisedLoss
from lightning_peft.progress import Part
from lightning_peft.quantization.config import QuantizationConfig
from lightning_peft.training.teacher import content_of_teacher, teacher_alone

logger = logging.getLogger(__name__)

TOKENS_AT_ONCE = 256
"""Tokens whose logits exist at once."""


def keep_teacher(
    data: SFTDataModule,
    objective: DistillConfig,
    model: ModelConfig,
    quantization: QuantizationConfig,
    dtype: torch.dtype,
    device: torch.device,
    cache_dir: str,
) -> None:
    """Give all samples of `data`, which is set up, what `objective.teacher_top_k` keeps of the teacher.

    Rank zero runs the teacher over the samples of which nothing is kept yet, and the others wait for it.
    """
    content = {
        "objective": {k: str(v) for k, v in asdict(objective).items() if k in OF_THE_TEACHER},
        "teacher": content_of_teacher(objective),
        "base": source_fingerprint(model),
        "model": str(asdict(model)),
        "quantization": str(asdict(quantization)),
        "dtype": str(dtype),
        "versions": installed_versions(),
    }
    vocabulary = int(empty_model(model).config.get_text_config().vocab_size)
    loaded: list[PreTrainedModel] = []

    def teacher() -> PreTrainedModel:
        if not loaded:
            loaded.append(teacher_alone(objective, model, quantization, dtype, device))
        return loaded[0]

    for samples in data.sample_sets:
        if not len(samples):
            continue
        text = json.dumps(content | {"samples": samples.fingerprint}, sort_keys=True)
        folder = cache_folder(cache_dir) / f"teacher-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"

        def make(samples: Samples = samples, folder: Path = folder) -> None:
            if (folder / VOCABULARY).is_file():
                logger.info("the teacher's likeliest tokens are read from %s", folder)
                return
            write_top(teacher(), samples, objective, vocabulary, folder)

        distributed.on_rank_zero(make)
        samples.keep_teacher(folder)


OF_THE_TEACHER = ("teacher", "teacher_adapter", "quantize_teacher", "temperature", "teacher_top_k")
"""Options that decide what is kept."""


@torch.inference_mode()
def write_top(
    model: PreTrainedModel, samples: Samples, objective: DistillConfig, vocabulary: int, folder: Path
) -> None:
    """Run the teacher over the samples, each a row of its own, and leave what is kept in `folder`."""
    loss = SupervisedLoss(model, packing=False).eval()
    shared = min(vocabulary, int(model.config.get_text_config().vocab_size))
    assert objective.teacher_top_k is not None
    count = min(objective.teacher_top_k, shared)
    total = int(samples.trained_starts[-1])
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    ids = open_memmap(partial / IDS, mode="w+", dtype=np.int32, shape=(total, count))
    columns = count + (count < shared)
    kept = open_memmap(partial / LOG_PROBABILITIES, mode="w+", dtype=np.float32, shape=(total, columns))
    written = 0
    with Part("the teacher reads the rows", len(samples)) as part:
        for place in part.counting(range(len(samples))):
            sample = samples[place]
            batch = collate([[sample.taught or sample]], 0, len((sample.taught or sample).input_ids) + 8, False)
            readout = loss.readout(move_data_to_device(batch, model.device))
            for start in range(0, len(readout.labels), TOKENS_AT_ONCE):
                tokens = slice(start, start + TOKENS_AT_ONCE)
                found, values = top_of(readout, tokens, count, shared, objective.temperature)
                stop = written + len(found)
                ids[written:stop], kept[written:stop] = found.cpu().numpy(), values.cpu().numpy()
                written = stop
    assert written == total, f"{written} tokens of {total}: {IGNORED_LABEL} is the label of all others"
    ids.flush()
    kept.flush()
    np.save(partial / VOCABULARY, np.asarray(shared))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    size = (ids.nbytes + kept.nbytes) / 2**20
    logger.info("the teacher's %d likeliest tokens at %d tokens are kept in %s (%.1f MiB)", count, total, folder, size)


def top_of(readout: Readout, tokens: slice, count: int, vocabulary: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the likeliest tokens of some of a readout's (n, count), and the log-probabilities of `bucketed`."""
    logits = in_fp32(final_logits(readout, tokens))[:, :vocabulary] / temperature
    ids = logits.topk(count, dim=-1).indices
    return ids, bucketed(logits, ids)
