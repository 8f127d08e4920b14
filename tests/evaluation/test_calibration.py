"""Scores of probabilities against their formulas, and the command on adapters trained here."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import small_model
from tiny_runs import tiny_config

from lightning_peft.commands.calibrate import calibrate
from lightning_peft.commands.evaluate import evaluate
from lightning_peft.commands.train import train
from lightning_peft.compose import compose_config
from lightning_peft.data.batch import Batch
from lightning_peft.evaluation.calibration import BINS, Tally
from lightning_peft.objectives.sft import SupervisedLoss


def tally(probabilities: torch.Tensor, labels: torch.Tensor) -> Tally:
    found = Tally()
    for part in (slice(0, 100), slice(100, None)):
        found.add(probabilities[part], labels[part])
    return found


def test_scores_are_their_formulas() -> None:
    torch.manual_seed(0)
    probabilities = torch.softmax(3 * torch.randn(300, 20), -1)
    labels = torch.randint(0, 20, (300,))
    confidence, guess = probabilities.max(1)
    hits = (guess == labels).float()
    one_hot = torch.nn.functional.one_hot(labels, 20)
    gaps = 0.0
    for place in range(BINS):
        inside = (confidence > place / BINS) & (confidence <= (place + 1) / BINS)
        if inside.any():
            gaps += float(inside.float().mean() * (confidence[inside].mean() - hits[inside].mean()).abs())

    scores = tally(probabilities, labels).result()

    assert scores.tokens == 300 and scores.accuracy == pytest.approx(float(hits.mean()))
    assert scores.nll == pytest.approx(float(-probabilities[torch.arange(300), labels].log().mean()), rel=1e-5)
    assert scores.brier == pytest.approx(float((probabilities - one_hot).square().sum(1).mean()), rel=1e-5)
    assert scores.entropy == pytest.approx(float(-(probabilities * probabilities.log()).sum(1).mean()), rel=1e-5)
    assert scores.ece == pytest.approx(gaps, rel=1e-4)


def test_labels_drawn_from_the_probabilities_are_calibrated() -> None:
    torch.manual_seed(0)
    probabilities = torch.softmax(2 * torch.randn(20_000, 5), -1)
    labels = torch.multinomial(probabilities, 1)[:, 0]

    assert tally(probabilities, labels).result().ece < 0.02 < tally(probabilities, (labels + 1) % 5).result().ece


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(ValueError, match="no supervised token"):
        Tally().result()


def test_command_scores_every_way(tmp_path: Path) -> None:
    """The mean's cross entropy is the loss of the run; draws, dropout and an ensemble stand beside it."""
    runs = [tmp_path / name for name in "ab"]
    for seed, run in enumerate(runs):
        words = ("method=balora", "adapter.rank=4", "optimizer.lr=0.01", "trainer.max_steps=4", f"seed={seed}")
        result = train(tiny_config(run, *words))
    words = [f"adapter_path={runs[1]}", "passes=3", "max_rows=8", "dropout=0.2", f"ensemble=[{runs[0]}]"]

    found = calibrate(compose_config("calibrate", words))

    assert list(found) == ["mean", "3 draws", "3 passes with dropout", "ensemble of 2"]
    assert found["mean"].nll == pytest.approx(result["validation_loss"], rel=1e-4)
    assert len({scores.nll for scores in found.values()}) == 4
    written = json.loads((runs[1] / "calibration.json").read_text())
    assert written["3 draws"]["ece"] == found["3 draws"].ece and (runs[1] / "calibration.png").is_file()
    again = calibrate(compose_config("calibrate", words))
    assert again == found


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "mamba"])
def test_logits_are_those_the_loss_is_taken_of(name: str) -> None:
    """This holds for logits that are scaled or capped, and for a model that would mix the samples of a row."""
    model = small_model(name).eval()
    torch.manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size - 1, (1, 24))
    labels = ids.clone()
    labels[0, [0, 10]] = -100
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    batch = Batch(ids, labels, positions, torch.tensor([0, 10, 24], dtype=torch.int32), 14, 24, 22)
    objective = SupervisedLoss(model)
    with torch.no_grad():
        objective.check(batch)
        objective.runs_apart = objective.runs_apart or name == "mamba"
        logits, tokens = objective.token_logits(batch)
        losses = objective.token_losses(batch).losses
    assert logits.shape == (22, model.config.vocab_size)
    torch.testing.assert_close(F.cross_entropy(logits.float(), tokens, reduction="none"), losses)
    alone = [model(input_ids=ids[:, part]).logits[0, :-1] for part in (slice(0, 10), slice(10, 24))]
    expected = F.cross_entropy(torch.cat(alone).float(), torch.cat([ids[0, 1:10], ids[0, 11:24]]), reduction="none")
    torch.testing.assert_close(losses.sort().values, expected.sort().values, rtol=1e-4, atol=1e-4)


def test_evaluate_scores_draws_beside_the_mean(tmp_path: Path) -> None:
    """The mean's cross entropy is the loss that `evaluate` gives; draws are those of `calibrate`."""
    words = ("method=balora", "adapter.rank=4", "optimizer.lr=0.01", "trainer.max_steps=3")
    train(tiny_config(tmp_path / "run", *words))
    own = [f"adapter_path={tmp_path}/run", "max_rows=6", "passes=3"]

    report = evaluate(compose_config("evaluate", [*own, "models=adapter", "samples=0"]))

    found = report["calibration"]
    assert found["mean"]["nll"] == pytest.approx(report["adapter"]["loss"], rel=1e-4)
    expected = calibrate(compose_config("calibrate", own))
    assert set(found) == {"mean", "3 draws"} and found["3 draws"]["ece"] == expected["3 draws"].ece
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["calibration"]["3 draws"]["brier"] > 0


def test_draws_of_what_draws_nothing_are_refused(tmp_path: Path) -> None:
    train(tiny_config(tmp_path / "run", "trainer.max_steps=1"))
    own = [f"adapter_path={tmp_path}/run", "passes=2"]
    with pytest.raises(ValueError, match="passes=2: draws are of an adapter of method=balora, and this model has none"):
        evaluate(compose_config("evaluate", own))
    with pytest.raises(ValueError, match="passes=2: draws are of an adapter; give adapter_path and leave models=both"):
        compose_config("evaluate", [*own, "models=base"])


def test_ensemble_of_two_bases_and_a_seed_that_is_none_are_refused(tmp_path: Path) -> None:
    train(tiny_config(tmp_path / "run", "trainer.max_steps=1"))
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    path = tmp_path / "other/adapter/lineage.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_fingerprint": "another"}))
    words = [f"adapter_path={tmp_path}/run", f"ensemble=[{tmp_path}/other]"]
    with pytest.raises(ValueError, match="ensemble=.*other: was trained on .*only adapters of one base are averaged"):
        calibrate(compose_config("calibrate", words))
    with pytest.raises(ValueError, match=f"seed={2**64}: must be from 0 to"):
        compose_config("calibrate", [words[0], f"seed={2**64}"])


def test_rejected_answers_are_no_right_tokens(tmp_path: Path) -> None:
    """The cross entropy of a run on pairs is that of the chosen answers, as `evaluate` has it."""
    train(tiny_config(tmp_path / "run", "objective=dpo", "trainer.max_steps=2"))
    found = calibrate(compose_config("calibrate", [f"adapter_path={tmp_path}/run", "max_rows=4"]))
    words = [f"adapter_path={tmp_path}/run", "max_rows=4", "models=adapter", "samples=0"]
    loss = evaluate(compose_config("evaluate", words))["adapter"]["loss"]
    assert found["mean"].nll == pytest.approx(loss, rel=1e-4)
