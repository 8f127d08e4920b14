"""Means over seeds, their intervals, the sentence and the next sweep, against a plain computation of each."""

import csv
import itertools
import json
import math
import os
import random
import shlex
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from brute_force import quantile, resampled
from hydra.core.override_parser.overrides_parser import OverridesParser

from lightning_peft.__main__ import main
from lightning_peft.checkpoint.lineage import Lineage, write_lineage
from lightning_peft.evaluation.smaller_ranks import RankScore, smallest_as_good
from lightning_peft.sweeps.cuts import cut_sentence
from lightning_peft.sweeps.doubts import doubts
from lightning_peft.sweeps.statistics import (
    SeedGroup,
    best_of_ranks,
    difference_interval,
    groups_of,
    next_command,
    sentence,
)
from lightning_peft.sweeps.sweep import Sweep, Trial, read_sweep, write_sweep
from lightning_peft.sweeps.table import heat_map, heat_map_title, table_rows

RANKS, RATES, SEEDS = (4, 8, 64), ("1e-3", "1e-2"), (0, 1, 2)


def loss_at(rank: int, rate: str, seed: int) -> float:
    """Return a loss: rank 8 and 64 do alike at a rate of their own, rank 4 does worse."""
    best = {4: 2.0, 8: 1.502, 64: 1.5}[rank] + 0.3 * (rate != {4: "1e-2", 8: "1e-2", 64: "1e-3"}[rank])
    return best + random.Random(f"{rank} {rate} {seed}").gauss(0, 0.01)


@pytest.fixture
def folder(tmp_path):
    """Return the folder of a finished sweep over rank, learning rate and seed."""
    trials = []
    for rank, rate, seed in itertools.product(RANKS, RATES, SEEDS):
        name = f"rank{rank}_lr{rate}_seed{seed}"
        words = [f"adapter.rank={rank}", f"optimizer.lr={rate}", f"seed={seed}"]
        loss = loss_at(rank, rate, seed)
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text(f"step,loss,validation_loss\n1,9,\n2,8,\n2,,{loss!r}\n")
        result = {"status": "finished", "validation_loss": loss, "trainable_parameters": 1000 * rank, "metrics": {}}
        (tmp_path / name / "result.json").write_text(json.dumps(result))
        trials.append(Trial(name, words, "finished", 1, is_waiting=False, result=result))
    swept = ["adapter.rank=4,8,64", "optimizer.lr=1e-3,1e-2", "seed=0,1,2"]
    write_sweep(Sweep(["model=tiny"], swept, "local", "validation_loss", count=18, trials=trials), tmp_path)
    return tmp_path


def last_validations(folder: Path, rank: int, rate: str) -> list[float]:
    """Read the last validations from the metrics.csv files, and from nothing else."""
    found = []
    for seed in SEEDS:
        with (folder / f"rank{rank}_lr{rate}_seed{seed}" / "metrics.csv").open() as file:
            found.append([float(row["validation_loss"]) for row in csv.DictReader(file) if row["validation_loss"]][-1])
    return found


def test_groups_are_what_the_metrics_files_say(folder):
    groups = groups_of(read_sweep(folder))
    assert len(groups) == 6
    for group in groups:
        rank, rate = int(group.values["adapter.rank"]), group.values["optimizer.lr"]
        losses = last_validations(folder, rank, rate)
        assert group.mean == pytest.approx(sum(losses) / 3)
        assert group.spread == pytest.approx(math.sqrt(sum((x - sum(losses) / 3) ** 2 for x in losses) / 2))
        means = resampled(losses)
        assert group.interval == pytest.approx((quantile(means, 0.025), quantile(means, 0.975)))


def test_each_rank_is_compared_at_its_own_best_rate(folder):
    found = {rank: group.values["optimizer.lr"] for rank, group in best_of_ranks(read_sweep(folder)).items()}
    assert found == {
        rank: min(RATES, key=lambda rate, rank=rank: statistics.fmean(last_validations(folder, rank, rate)))
        for rank in RANKS
    }
    assert found == {4: "1e-2", 8: "1e-2", 64: "1e-3"}


def test_sentence_has_the_figures_of_the_files(folder):
    small, large = last_validations(folder, 8, "1e-2"), last_validations(folder, 64, "1e-3")
    differences = [one - other for one in resampled(small) for other in resampled(large)]
    low, high = quantile(differences, 0.025), quantile(differences, 0.975)
    assert low <= 0 <= high
    assert sentence(read_sweep(folder)) == (
        f"rank 8 is within noise of rank 64 at an eighth of the parameters: validation_loss {sum(small) / 3:.4g} and "
        f"{sum(large) / 3:.4g}, 95 % of the difference from {low:.2g} to {high:.2g} over 3 seeds; each at its best lr"
    )


def test_largest_rank_cut_by_svd_is_spoken_of(folder):
    sweep = read_sweep(folder)
    best = min(SEEDS, key=lambda seed: loss_at(64, "1e-3", seed))
    trial = f"rank64_lr1e-3_seed{best}"
    asked = f"lightning-peft inspect s/{trial} smaller_ranks=true"
    assert cut_sentence(sweep, folder, "s").endswith(f"not known yet: {asked}")
    cuts = [
        RankScore(32, 1.5, 0.0, (-0.01, 0.01)),
        RankScore(8, 1.51, 0.01, (-0.001, 0.02)),
        RankScore(4, 2, 0.5, (0.4, 0.6)),
    ]
    ranks = {"loss": 1.5, "rows": 200, "as_good": smallest_as_good(cuts).rank, "ranks": [asdict(cut) for cut in cuts]}
    (folder / trial / "inspection.json").write_text(json.dumps({"layers": {}, "smaller_ranks": ranks}))
    assert cut_sentence(sweep, folder, "s") == (
        f"{trial}, cut by SVD without training: rank 8 is within noise of the whole of rank 64 at an eighth of the "
        "parameters: loss 1.51 and 1.5, 95 % of the difference from -0.001 to 0.02 over 200 rows"
    )
    ranks |= {"as_good": None, "ranks": [asdict(cuts[2])]}
    (folder / trial / "inspection.json").write_text(json.dumps({"layers": {}, "smaller_ranks": ranks}))
    assert "rank 4 is worse than the whole beyond noise: loss 2 and 1.5" in cut_sentence(sweep, folder, "s")
    (folder / trial / "adapter").mkdir()
    write_lineage(Lineage("base", "tiny", adapter_sha256="trained on"), folder / trial / "adapter")
    os.utime(folder / trial / "adapter" / "lineage.json", (0, 0))  # a clock that was set back
    assert cut_sentence(sweep, folder, "s").endswith(asked)
    of_this = {"adapter_sha256": "trained on", "layers": {}, "smaller_ranks": ranks}
    (folder / trial / "inspection.json").write_text(json.dumps(of_this))
    assert "rank 4 is worse than the whole beyond noise" in cut_sentence(sweep, folder, "s")
    sweep.trials = [one for one in sweep.trials if one.values["adapter.rank"] == "64"]
    assert cut_sentence(sweep, folder, "s") is None


def test_difference_beyond_noise_is_said(folder):
    sweep = read_sweep(folder)
    sweep.trials = [trial for trial in sweep.trials if trial.values["adapter.rank"] != "8"]
    assert sentence(sweep).startswith(
        "rank 64 is best: validation_loss 1.504, against 1.994 of rank 4, beyond noise: 95 % of the "
    )


def test_sentence_of_a_pruned_sweep_says_that_the_means_are_of_those_that_were_ahead(folder):
    sweep = read_sweep(folder)
    sweep.rungs, whole = [1], sentence(sweep)
    assert "rungs stopped" not in whole
    stopped = sweep.trial("rank64_lr1e-3_seed1")
    stopped.state, stopped.rung_values = "paused", [5.0]
    said = sentence(sweep)
    assert "over 2 and 3 seeds" in said
    assert said.endswith("; of these 6 trials rungs stopped 1, so the means are of those that were ahead")
    other = sweep.trial("rank4_lr1e-3_seed1")  # these are of a setting that is not compared
    stopped.state, stopped.rung_values, other.state, other.rung_values = "finished", [5.0], "paused", [5.0]
    assert sentence(sweep) == whole


def test_one_seed_says_that_noise_is_unknown_and_asks_for_seeds(folder):
    sweep = read_sweep(folder)
    sweep.swept = sweep.swept[:2]
    sweep.trials = [trial for trial in sweep.trials if trial.overrides.pop() == "seed=0"]
    assert "one seed each, so noise is unknown" in sentence(sweep)
    words = shlex.split(next_command(sweep, "s"))
    assert words[:3] == ["lightning-peft", "submit", "-m"] and words[3] == "model=tiny"
    assert set(words[4:]) == {
        "adapter.rank=4,8,64", "optimizer.lr=1e-2,1e-3", "seed=0,1,2", "sweep_dir=s-next", "cluster=local",
    }  # fmt: skip


def test_next_sweep_goes_on_beyond_an_edge(folder):
    words = shlex.split(next_command(read_sweep(folder), "s"))
    assert {"adapter.rank=8", "optimizer.lr=0.01,0.03,0.09", "seed=0,1,2"} <= set(words)


def test_next_is_a_training_once_nothing_is_left_to_look_for(folder):
    sweep = read_sweep(folder)
    for trial in sweep.trials:
        trial.overrides.pop(1)
    sweep.swept = ["adapter.rank=4,8,64", "seed=0,1,2"]
    sweep.trials = [trial for trial in sweep.trials if "lr1e-2" in trial.name or "rank64" in trial.name]
    sweep.trials = [trial for trial in sweep.trials if trial.name.startswith("rank8") or "lr1e-3" not in trial.name]
    for trial in sweep.trials:
        trial.result["validation_loss"] = {"4": 2.0, "8": 1.5, "64": 1.8}[trial.values["adapter.rank"]] + int(
            trial.values["seed"]
        ) / 1000
    assert next_command(sweep, "s") == "lightning-peft train model=tiny adapter.rank=8"


def test_trials_without_a_number_are_in_no_mean(folder):
    sweep = read_sweep(folder)
    sweep.trials[0].result["validation_loss"] = math.nan
    sweep.trials[1].state = "failed"
    group = groups_of(sweep)[0]
    assert len(group.scores) == 1 and group.spread is None and group.interval is None
    sweep.trials[2].state = "failed"
    assert groups_of(sweep)[0].scores == [] and math.isnan(groups_of(sweep)[0].mean)
    assert "rank 8 is within noise of rank 64" in sentence(sweep)


def test_same_values_and_seed_twice_are_one_score(folder):
    sweep = read_sweep(folder)
    before = {group.label: group.scores for group in groups_of(sweep)}
    sweep.trials += [replace(sweep.trials[0], name="again"), replace(sweep.trials[4], name="and again")]
    assert {group.label: group.scores for group in groups_of(sweep)} == before
    assert "trained with the same values and seed, counted once: rank4_lr1e-3_seed0, again" in doubts(sweep)
    for trial in sweep.trials:
        trial.overrides = trial.overrides[:1]
    sweep.swept = sweep.swept[:1]
    assert all(group.interval is None for group in groups_of(sweep))
    assert "beyond noise" not in sentence(sweep) and "within noise" not in sentence(sweep)


def of_ranks(scores: dict[str, list[float]], key: str = "adapter.rank") -> Sweep:
    """Return a sweep over one key and seeds, with a score a seed; nan is a trial that diverged."""
    trials = [
        Trial(f"{value}_{seed}", [f"{key}={value}", f"seed={seed}"], "diverged" if math.isnan(loss) else "finished", 1,
              is_waiting=False, result={"status": "finished", "steps": 9, "validation_loss": loss, "metrics": {}})
        for value, losses in scores.items() for seed, loss in enumerate(losses)
    ]  # fmt: skip
    words = [f"{key}={','.join(scores)}", "seed=0,1,2"]
    return Sweep(["model=tiny"], words, "local", "validation_loss", count=len(trials), trials=trials)


def alike(mean: float) -> list[float]:
    return [mean, mean + 0.001, mean + 0.002]


@pytest.mark.parametrize("best", [1.0, 3.0])
def test_three_scores_beside_one_are_not_one_seed_each(best):
    sweep = of_ranks({"4": [2.0, 2.1, 2.2], "8": [best, math.nan, math.nan]})
    assert "over 1 and 3 seeds, too few to know noise" in sentence(sweep)
    assert "adapter.rank=8: its mean is of 1 of 3 seeds; 2 diverged" in doubts(sweep)


def test_best_rank_without_a_number_is_named_and_kept():
    sweep = of_ranks({"r4": alike(2.0), "tapered": alike(1.0), "r16": alike(2.0)}, "rank")
    assert sentence(sweep).startswith("rank=tapered is best: validation_loss 1.001")
    assert sentence(sweep).endswith("within noise of it: none")
    assert next_command(sweep, "s") == "lightning-peft train model=tiny rank=tapered"
    once = of_ranks({"r4": [2.0], "tapered": [1.0], "r16": [2.0]}, "rank")
    assert "rank=tapered,r4,r16" in shlex.split(next_command(once, "s"))


def test_setting_of_one_score_beside_a_best_of_three_is_said():
    sweep = of_ranks({"[q,v]": alike(1.0), "[k]": [1.5, math.nan, math.nan], "[o]": alike(2.0)}, "target")
    assert sentence(sweep).endswith("within noise of it: none; of one seed, so not known to be: target=[k]")


def test_list_that_is_best_is_one_value():
    sweep = of_ranks({"[q,v]": alike(1.0), "[q]": alike(2.0)}, "target")
    assert shlex.split(next_command(sweep, "s")) == ["lightning-peft", "train", "model=tiny", "target=[q,v]"]
    once = of_ranks({"[q,v]": [1.0], "[q]": [2.0]}, "target")
    (word,) = [word for word in shlex.split(next_command(once, "s")) if word.startswith("target=")]
    swept = OverridesParser.create().parse_override(word)
    assert list(swept.sweep_string_iterator()) == ["[q,v]", "[q]"]


def test_ranks_beyond_the_options_of_the_group_are_given_by_the_key():
    words = shlex.split(next_command(of_ranks({"r128": alike(2.0), "r256": alike(1.0)}, "rank"), "s"))
    assert "adapter.rank=256,512,1024" in words and not any(word.startswith("rank=") for word in words)


def test_axes_are_sorted_by_the_numbers_in_words():
    sweep = of_ranks({rank: alike(1.0) for rank in ("r16", "r4", "tapered", "r64", "r8")}, "rank")
    for trial in sweep.trials:
        trial.overrides.append("optimizer.lr=1e-3")
    sweep.swept.append("optimizer.lr=1e-3,1e-2")
    assert heat_map(sweep).rows == ["r4", "r8", "r16", "r64", "tapered"]


def test_axes_of_a_page_are_sorted_alike():
    pytest.importorskip("matplotlib")
    from lightning_peft.report.figures import ordered

    assert ordered({"r16", "r4", 2, "r8"}) == [2, "r4", "r8", "r16"]


def test_large_metric_is_ranked_from_the_top(folder):
    sweep = read_sweep(folder)
    sweep.metric = "-accuracy"
    for trial in sweep.trials:
        trial.result["metrics"] = {"accuracy": -trial.result["validation_loss"]}
    assert sentence(sweep).startswith("rank 8 is within noise of rank 64 at an eighth of the parameters: accuracy -1.")


def test_many_scores_are_resampled_at_random_alike_each_time():
    generator = random.Random(0)
    scores = [generator.gauss(0, 1) for _ in range(40)]
    one, other = SeedGroup({}, [], scores, None), SeedGroup({}, [], [x + 0.5 for x in scores], None)
    assert one.interval == SeedGroup({}, [], list(scores), None).interval
    half = 1.96 * statistics.pstdev(scores) / math.sqrt(40)
    assert one.interval == pytest.approx((one.mean - half, one.mean + half), abs=0.05)
    low, high = difference_interval(other, one)
    assert low < 0.5 < high


def test_heat_map_is_of_means_and_says_what_was_folded(folder):
    sweep = read_sweep(folder)
    cells = heat_map(sweep)
    assert heat_map_title(cells) == "validation_loss, mean over seed"
    assert cells.cells[8, 0.001] == pytest.approx(statistics.fmean(last_validations(folder, 8, "1e-3")))
    for trial in sweep.trials:
        trial.overrides.append("adapter.alpha=8")
    sweep.swept.append("adapter.alpha=8,16")
    cells = heat_map(sweep)
    assert heat_map_title(cells) == "validation_loss, mean over seed, best over lr"
    assert cells.cells[64, 8] == pytest.approx(statistics.fmean(last_validations(folder, 64, "1e-3")))


def test_table_and_its_json_hold_the_groups(folder, capsys):
    assert main(["sweep", "table", str(folder), f"output_path={folder}/t.json"]) == 0
    printed = capsys.readouterr().out
    assert "validation_loss over the seeds" in printed and "rank 8 is within noise of rank 64" in printed
    assert "next: lightning-peft submit -m model=tiny adapter.rank=8" in printed
    assert f"lightning-peft inspect {folder}/rank64_lr1e-3_seed" in printed.replace("\n", "")
    row = next(row for row in json.loads((folder / "t.json").read_text()) if row["trial"] == "rank8_lr1e-2_seed1")
    losses = last_validations(folder, 8, "1e-2")
    assert row["seeds"] == 3 and row["validation_loss_mean"] == pytest.approx(statistics.fmean(losses))
    assert row["validation_loss_low"] <= row["validation_loss_mean"] <= row["validation_loss_high"]
    assert table_rows(read_sweep(folder), "validation_loss_mean")[0]["rank"] in (8, 64)
