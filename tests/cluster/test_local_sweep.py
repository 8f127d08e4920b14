"""Sweeps run by processes of this machine: from the words to the table, through everything that goes wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lightning_peft.__main__ import main
from lightning_peft.commands.plan_sweep import plan, trial_config
from lightning_peft.compose import compose_config
from lightning_peft.sweeps.sweep import ENDED, Sweep, changed_sweep, read_sweep, refresh

TINY = [
    "model=tiny", "data.max_rows=8", "data.max_validation_rows=2", "trainer.accelerator=cpu",
    "trainer.precision=32-true", "trainer.max_steps=2", "validation.samples=0",
]  # fmt: skip


def planned(*words: str, sweep: tuple[str, ...] = ()) -> Sweep:
    return plan(compose_config("submit_sweep", ["sweep.cluster=local", *sweep]), [*TINY, *words])


def seen(folder: Path) -> Sweep:
    with changed_sweep(folder) as sweep:
        refresh(sweep, folder, {})
    return sweep


def wait_until(folder: Path, condition, seconds: float = 240) -> Sweep:
    deadline = time.monotonic() + seconds
    while not (folder / "sweep.json").exists() or not condition(seen(folder)):
        assert time.monotonic() < deadline, folder.joinpath("workers.txt").read_text()
        time.sleep(0.1)
    return read_sweep(folder)


def has_ended(sweep: Sweep) -> bool:
    return len(sweep.trials) == sweep.count and all(trial.state in ENDED for trial in sweep.trials)


def test_every_grid_of_hydra_becomes_trials():
    sweep = planned("adapter.rank=4,8", "adapter.alpha=range(8,25,8)", "method=choice(lora,dora)", "data=glob([a*,g*])")
    assert sweep.count == 2 * 3 * 2 * 2
    assert sweep.trials[0].values == {"adapter.rank": "4", "adapter.alpha": "8", "method": "lora", "data": "alpaca"}
    names = [trial.name for trial in sweep.trials]
    assert len(set(names)) == len(names) and not any(c in name for name in names for c in "=,/ ")


def test_names_of_choices_that_differ_in_special_characters_only_differ():
    sweep = planned("adapter.target_modules=[q_proj,k_proj],['q_proj,k_proj']")
    assert len({trial.name for trial in sweep.trials}) == 2


def test_numbers_stand_in_the_names_as_typed():
    sweep = planned("optimizer.lr=1e30,1e-3,0.10")
    assert [trial.name for trial in sweep.trials] == ["lr1e30", "lr1e-3", "lr0.10"]
    assert [trial.values["optimizer.lr"] for trial in sweep.trials] == ["1e30", "1e-3", "0.10"]


def test_metric_that_trials_score_is_taken(tmp_path, capsys):
    words = ["validation.metrics=[text_to_sql]", "sweep.metric=-execution_accuracy/easy", "cluster.dry_run=true"]
    assert main(["submit", "-m", *TINY, "adapter.rank=4,8", *words, f"sweep_dir={tmp_path}/s"]) == 0
    assert "--array=0-1" in capsys.readouterr().out


def test_config_of_a_trial_is_resolved_and_resumes(tmp_path):
    sweep = planned("adapter.rank=4,8")
    config = trial_config(sweep, sweep.trials[1], tmp_path)
    assert (config.adapter.rank, config.run_dir, config.resume) == (8, str(tmp_path / "rank8"), "auto")


def test_random_search_draws_before_it_starts():
    sweep = planned(
        "optimizer.lr=tag(log,interval(1e-4,1e-2))", "adapter.rank=4,8",
        sweep=("sweep.search=random", "sweep.trials=5", "sweep.seed=1"),
    )  # fmt: skip
    assert len(sweep.trials) == sweep.count == 5
    assert all(1e-4 <= float(trial.values["optimizer.lr"]) <= 1e-2 for trial in sweep.trials)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["adapter.rank=4"], "-m: no word sweeps"),
        (["adapter.rank=4,0"], "adapter.rank=0: a rank is at least 1"),
        (["adapter.rnk=4,8"], "adapter.rnk: no such option; did you mean adapter.rank"),
        (["optimizer.lr=interval(0,1)"], "an interval has no end of values; add sweep.search=random"),
        (["adapter.rank=4,8", "hydra/launcher=joblib"], "Hydra's launchers and sweepers are for train -m"),
        (["adapter.rank=4,8", "resume=never"], "resume=never: not for a sweep"),
        (
            ["adapter.rank=4,8", "sweep.metric=-execution_accuracy"],
            "no number of a trial's result.json; choose one of validation_loss, train_loss, steps",
        ),
        (["adapter.rank=4,8", "sweep.metric=-execution_accuracy"], "add validation.metrics=[execution_accuracy] to"),
        (["adapter.rank=4,8", "sweep.metric=rouge", "validation.metrics=[rouge]"], "validation.metrics=rouge: no such"),
        (
            ["adapter.rank=4,8", "sweep.metric=execution_accuracy", "validation.metrics=[execution_accuracy]"],
            "a large execution_accuracy is good; write sweep.metric=-execution_accuracy",
        ),
        (
            ["adapter.rank=4,8", "sweep.metric=f", "validation.metrics=[nowhere:f,nowhere:f_mean]"],
            "f_mean is the table's column of f over seeds",
        ),
        (["adapter.rank=4,8", "validation.metrics=[nowhere:f]"], "validation.metrics=nowhere:f: cannot be imported"),
        (["adapter.rank=4,8", "+adapter.rnak=4"], "adapter.rnak: no such option; did you mean adapter.rank"),
        (["+adapter.rnak=4,8"], "adapter.rnak: no such option; did you mean adapter.rank"),
        (
            ["adapter.rank=4,8", "data=jsonl", "data.train_path=x.jsonl", "data.validation_fraction=0"],
            "there are no validation rows; use sweep.metric=train_loss",
        ),
        (["adapter.rank=4,8", "sweep.paralel=2"], "sweep.paralel: no such option"),
        (["seed=0,0,1"], "seed=0: is the same training as seed=0; give each value once"),
        (["optimizer.lr=1e-3,0.001"], "optimizer.lr=0.001: is the same training as optimizer.lr=1e-3"),
        (["rank=r4,r8", "adapter.rank=2,4"], "rank=r8 adapter.rank=2: is the same training as rank=r4 adapter.rank=2"),
        (["adapter.rank=2,4", "adapter.rank=8,16"], "adapter.rank=2,4: adapter.rank is given twice"),
        (["seed=1,2", "seed=3"], "seed=1,2: seed is given twice"),
        (["seed=range(0)"], "seed=range(0): holds no value"),
    ],
)
def test_wrong_words_start_nothing(tmp_path, capsys, words, message):
    assert main(["submit", "-m", "cluster=local", *TINY, f"sweep_dir={tmp_path}/sweep", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["status"], "sweep_dir=...: has to be given"),
        (["look", "x"], "verb=look"),
        (["status", "nowhere"], "nowhere: holds no sweep.json"),
        (["retry", "nowhere"], "nowhere: holds no sweep.json"),
        (["status", "x", "adapter.rank=4"], "adapter.rank=4: overrides are for sweep retry"),
        (["table", "x", "output_path=table.txt"], "must end in .csv, .json, .html or .svg"),
    ],
)
def test_wrong_words_of_the_verbs_are_named(capsys, words, message):
    assert main(["sweep", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Run three trials, one of which fails; whoever submitted them is killed at once."""
    folder = tmp_path_factory.mktemp("story") / "sweep"
    rows = folder.parent / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n} + 1 =", "completion": str(n + 1)}) + "\n" for n in range(12)))
    words = [
        "submit", "-m", "cluster=local", *TINY, "data=jsonl", f"sweep_dir={folder}", "sweep.parallel=2",
        "adapter.rank=2,4", f"data.train_path={rows},{folder.parent}/missing.jsonl",
    ]  # fmt: skip
    submitter = subprocess.Popen([sys.executable, "-m", "lightning_peft", *words], start_new_session=True)
    wait_until(folder, lambda sweep: len(sweep.workers) == 2)
    os.killpg(submitter.pid, signal.SIGKILL)
    submitter.wait()
    wait_until(folder, has_ended)
    return folder, rows


@pytest.mark.slow
def test_sweep_outlives_its_submitter_and_a_failed_trial(story):
    folder, rows = story
    for trial in read_sweep(folder).trials:
        good = trial.values["data.train_path"] == str(rows)
        wait_until(folder, lambda sweep, name=trial.name: sweep.trial(name).exit_code is not None)
        trial = read_sweep(folder).trial(trial.name)
        assert (trial.state, trial.exit_code, trial.attempts) == (("finished", 0, 1) if good else ("failed", 2, 1))
        assert (folder / trial.name / "result.json").exists() == good


@pytest.mark.slow
def test_table_holds_what_the_results_say(story, tmp_path, capsys):
    folder, _ = story
    assert main(["sweep", "table", str(folder), f"output_path={tmp_path}/table.json"]) == 0
    rows = json.loads((tmp_path / "table.json").read_text())
    losses = []
    for row in rows[:2]:
        result = json.loads((folder / row["trial"] / "result.json").read_text())
        assert {key: row[key] for key in result if key in row} == {key: result[key] for key in result if key in row}
        losses.append(result["validation_loss"])
    assert losses == sorted(losses) and [row["validation_loss"] for row in rows[2:]] == [None, None]
    assert f"best validation_loss: {losses[0]:.6g} of {rows[0]['trial']}" in capsys.readouterr().out


@pytest.mark.slow
def test_retry_runs_the_failed_ones_again_with_other_words(story, capsys):
    folder, rows = story
    before = {trial.name: trial.state for trial in seen(folder).trials}
    assert main(["sweep", "retry", str(folder), "failed=true", f"data.train_path={rows}"]) == 2
    assert f"data.train_path={rows}: data.train_path is swept, so each trial keeps its own" in capsys.readouterr().err
    (folder.parent / "missing.jsonl").write_text(rows.read_text())
    assert main(["sweep", "retry", str(folder), "failed=true", "optimizer.lr=0.0123"]) == 0
    for trial in wait_until(folder, has_ended).trials:
        was_good = before[trial.name] == "finished"
        assert (trial.state, trial.attempts) == ("finished", 1 if was_good else 2)
        config = yaml.safe_load((folder / trial.name / "config.yaml").read_text())
        assert (config["optimizer"]["lr"] != 0.0123) == was_good
    assert main(["sweep", "retry", str(folder), "failed=true"]) == 2
    assert "nothing to run again: 4 trials: 4 finished" in capsys.readouterr().err


@pytest.mark.slow
def test_cancel_stops_running_and_waiting_trials_and_a_retry_resumes(tmp_path):
    folder = tmp_path / "sweep"
    words = ["trainer.max_steps=100000", "checkpoint.every_n_steps=5", "adapter.rank=2,4", f"sweep_dir={folder}"]
    assert main(["submit", "-m", "cluster=local", *TINY, *words, "schedule=constant", "schedule.warmup_steps=0"]) == 0
    wait_until(folder, lambda sweep: list((folder / "rank2" / "checkpoints").glob("step-*.ckpt")))
    running = seen(folder).trial("rank2").process
    assert main(["sweep", "cancel", str(folder)]) == 0
    assert not running.is_alive
    assert [trial.state for trial in wait_until(folder, has_ended).trials] == ["cancelled", "cancelled"]
    assert not (folder / "rank4" / "checkpoints").exists()
    steps = [int(row.split(",")[0]) for row in (folder / "rank2" / "metrics.csv").read_text().splitlines()[1:]]
    assert main(["sweep", "retry", str(folder), "trials=[rank2]", f"trainer.max_steps={steps[-1] + 3}"]) == 0
    (trial, _) = wait_until(folder, has_ended).trials
    assert (trial.state, trial.result["steps"]) == ("finished", steps[-1] + 3)
    assert "step 1/" not in (folder / "rank2" / "log.txt").read_text().split(f"/{steps[-1] + 3} ")[0][-200:]


@pytest.mark.slow
def test_trial_outlives_its_worker_and_the_rest_is_lost_until_retried(tmp_path):
    folder = tmp_path / "sweep"
    assert main(["submit", "-m", "cluster=local", *TINY, "adapter.rank=2,4", f"sweep_dir={folder}"]) == 0
    sweep = wait_until(folder, lambda s: s.trials[0].process not in (None, *s.workers))
    os.kill(sweep.workers[0].pid, signal.SIGKILL)
    ended = wait_until(folder, has_ended)
    assert [trial.state for trial in ended.trials] == ["finished", "lost"]
    assert main(["sweep", "retry", str(folder), "failed=true"]) == 0
    assert [trial.state for trial in wait_until(folder, has_ended).trials] == ["finished", "finished"]
