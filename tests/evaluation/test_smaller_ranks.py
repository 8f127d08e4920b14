"""A cut adapter is scored as the whole one is, and the smallest rank that does as well is found."""

import numpy as np
import pytest
import torch
from adapter_models import llama, perturb, tokens

from lightning_peft.adapters.changes import changes_of
from lightning_peft.adapters.inject import adapters, inject_adapters
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.data.batch import Batch
from lightning_peft.evaluation.runner import mean_loss
from lightning_peft.evaluation.smaller_ranks import (
    RankScore,
    halves,
    resampled,
    row_losses,
    score_ranks,
    smallest_as_good,
)


def learned(true_rank: int):
    """Return a model whose LoRA of rank 8 uses so many directions, and batches that are what it says."""
    model = llama()
    inject_adapters(model, LoRAConfig(rank=8))
    perturb(model, 1.0)
    with torch.no_grad():
        for _, layer in adapters(model):
            layer.lora_B.weight[:, true_rank:] = 0
    model.eval()
    batches = []
    for seed in range(4):
        torch.manual_seed(seed)
        ids = tokens(batch=3)
        with torch.no_grad():
            said = model(input_ids=ids).logits.argmax(-1)
        labels = torch.cat([torch.full_like(ids[:, :1], -100), said[:, :-1]], 1)
        places = torch.arange(ids.shape[1]).expand_as(ids)
        bounds = torch.arange(0, ids.numel() + 1, ids.shape[1], dtype=torch.int32)
        batches.append(Batch(ids, labels, places, bounds, ids.shape[1], ids.numel(), int((labels != -100).sum())))
    return model, batches


def test_losses_by_row_add_up_to_the_loss():
    model, batches = learned(4)
    sums, counts = row_losses(model, batches)
    assert len(sums) == 12 and counts.tolist() == [11] * 12
    assert sums.sum() / counts.sum() == pytest.approx(mean_loss(model, batches)[0], rel=1e-6)


def test_smallest_rank_that_does_as_well_is_the_one_that_is_used():
    model, batches = learned(2)
    whole, scores = score_ranks(model, changes_of(model), 8, batches)
    assert [score.rank for score in scores] == [4, 2, 1] and whole == pytest.approx(scores[1].loss, abs=1e-5)
    assert scores[2].is_worse and scores[2].interval[0] < scores[2].difference < scores[2].interval[1]
    best = smallest_as_good(scores)
    assert best is not None and best.rank == 2
    assert not dict(adapters(model))


def test_interval_is_the_normal_one_for_many_rows():
    draw = np.random.default_rng(1)
    differences, counts = draw.normal(0.5, 2.0, 400), np.ones(400)
    low, high = resampled(differences, counts)
    half = 1.96 * differences.std() / 20
    assert low == pytest.approx(differences.mean() - half, abs=0.02)
    assert high == pytest.approx(differences.mean() + half, abs=0.02)


def test_no_rank_below_one_that_is_worse_is_taken():
    def score(rank: int, low: float) -> RankScore:
        return RankScore(rank, 1.0, low + 0.1, (low, low + 0.2))

    assert smallest_as_good([score(8, -0.1), score(4, 0.05), score(2, -0.1)]) == score(8, -0.1)
    assert smallest_as_good([score(8, 0.1)]) is None
    assert halves(12) == [6, 3, 1] and halves(1) == []
