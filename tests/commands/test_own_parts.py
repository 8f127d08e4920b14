"""Option files and callbacks of one's own, beside the package's, wherever a training is started from."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from lightning_peft.__main__ import main
from lightning_peft.command_line import first_trial
from lightning_peft.commands.plan_sweep import plan, trial_config
from lightning_peft.compose import compose_config
from lightning_peft.words import everyday

CALLBACK = "from lightning.pytorch import Callback\n\n\nclass Mine(Callback):\n    pass\n"


@pytest.fixture
def conf(tmp_path, monkeypatch):
    """Return a working folder with an option of `data` and a group of its own, in conf/."""
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "experiment").mkdir()
    (tmp_path / "conf" / "data" / "mine.yaml").write_text("defaults: [jsonl]\ntrain_path: rows.jsonl\n")
    experiment = "# @package _global_\ndefaults: [{override /rank: r4}]\nseed: 7\n"
    (tmp_path / "conf" / "experiment" / "foo.yaml").write_text(experiment)
    monkeypatch.chdir(tmp_path)
    return "hydra.searchpath=[file://conf]"


def test_own_folder_is_found_by_the_first_trial_of_train_m(conf):
    config = compose_config("train", first_trial([conf, "model=tiny", "data=mine", "+experiment=foo", "seed=1,2"]))
    assert (config.data.train_path, config.adapter.rank, config.seed) == ("rows.jsonl", 4, 1)


def test_conf_dir_is_the_folder_of_ones_own_options(conf, tmp_path):
    words = everyday("train", ["data=mine", "model=tiny", "+experiment=foo", "conf_dir=conf"])
    config = compose_config("train", words)
    assert (config.data.train_path, config.adapter.rank, config.seed) == ("rows.jsonl", 4, 7)
    assert words[0] == f"hydra.searchpath=[file://{tmp_path}/conf]"  # this holds where a job starts elsewhere too
    with pytest.raises(ValueError, match="conf_dir=lost: no such folder; it holds GROUP/NAME.yaml"):
        everyday("train", ["conf_dir=lost"])
    with pytest.raises(ValueError, match="conf_dir=conf and hydra.searchpath=.*: give all folders by one of them"):
        everyday("train", ["conf_dir=conf", conf])


def test_own_option_of_a_group_is_no_module(conf):
    (Path("conf") / "target_modules").mkdir()
    (Path("conf") / "target_modules" / "ends.yaml").write_text("# @package adapter\ntarget_modules: [q_proj]\n")
    for folder, expected in ((["conf_dir=conf"], ["q_proj"]), ([], ["ends"])):
        config = compose_config("train", everyday("train", ["model=tiny", "target_modules=ends", *folder]))
        assert config.adapter.target_modules == expected


def test_recipe_may_be_a_file(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("# @package _global_\ndefaults:\n  - override /method: dora\n  - _self_\nadapter:\n  rank: 3\n")
    words = everyday("train", [f"recipe={recipe}", "seed=5"])
    assert words == ["method=dora", "adapter.rank=3", "seed=5"]
    recipe.write_text("defaults: [a, b]\n")
    with pytest.raises(ValueError, match="mine.yaml: defaults: 'a' must be of the form"):
        everyday("train", [f"recipe={recipe}"])
    with pytest.raises(ValueError, match="lost.yaml: no such file"):
        everyday("train", ["recipe=lost.yaml"])


@pytest.mark.parametrize("cluster", ["local", "slurm"])
def test_own_folder_is_found_by_the_trials_of_submit_m(conf, tmp_path, monkeypatch, cluster):
    words = [conf, "model=tiny", "data=glob([min*,cmu*])", "+experiment=foo"]
    sweep = plan(compose_config("submit_sweep", [f"sweep.cluster={cluster}"]), words)
    assert [trial.values for trial in sweep.trials] == [{"data": "cmudict"}, {"data": "mine"}]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # `sweep retry` may be called there
    config = trial_config(sweep, sweep.trials[1], tmp_path)
    assert (config.data.train_path, config.seed) == ("rows.jsonl", 7)


def test_mistyped_group_of_ones_own_is_named(conf):
    with pytest.raises(ValueError, match="experimnet: no such option; did you mean experiment"):
        compose_config("train", [conf, "+experimnet=foo"])


def test_words_of_open_dictionaries_need_no_plus():
    timer = "lightning.pytorch.callbacks.Timer"
    words = ["trainer.max_time=00:01:00:00", f"callbacks.t._target_={timer}", "callbacks.t.verbose=false"]
    config = compose_config("train", [*words, "claim.loss=1", "trainer.max_steps=3"])
    assert config.trainer["max_time"] == "00:01:00:00" and config.trainer["max_steps"] == 3
    assert config.callbacks == {"t": {"_target_": timer, "verbose": False}} and config.claim["loss"] == 1
    assert compose_config("train", [f"+{word}" for word in words]).callbacks == config.callbacks


TINY = ["train", "model=tiny", "data.max_rows=8", "data.max_validation_rows=2", "trainer.max_steps=2", "run_dir=run"]
LIGHTNINGS = "callbacks.mine._target_=lightning.pytorch.callbacks."


class Broken(Callback):
    """A callback of somebody's own with a defect."""

    def on_train_start(self, trainer, pl_module):
        torch.cat([])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["EarlyStopping", "callbacks.mine.monitor=nope", "trainer.max_steps=8"], "callbacks.mine: Early stopping con"),
        (["LearningRateMonitor", "logger=none"], "callbacks.mine: Cannot use `LearningRateMonitor` callback with"),
        (["BatchSizeFinder"], "callbacks.mine: Field batch_size not found"),
        (["StochasticWeightAveraging", "callbacks.mine.swa_lrs=0.1"], "callbacks.mine: SWA with `swa_epoch_start`"),
        (["ModelPruning", "callbacks.mine.pruning_fn=l1_unstructured"], "callbacks.mine: torch.cat(): expected a non"),
    ],
)
def test_what_a_callback_of_lightning_refuses_is_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    callback, *others = words
    assert main([*TINY, f"{LIGHTNINGS}{callback}", *others]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")


def test_a_defect_of_ones_own_callback_is_shown_with_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="expected a non-empty list"):
        main([*TINY, f"callbacks.mine._target_={__name__}.Broken"])


@pytest.mark.parametrize("word", ["limit_train_batches=0", "limit_train_batches=0.5", "overfit_batches=1"])
def test_fewer_batches_are_asked_for_by_rows_or_steps(word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, f"trainer.{word}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: trainer.{word.partition('=')[0]}: ") and "data.max_rows" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [[str(Path(sys.executable).with_name("lightning-peft"))], [sys.executable, "-m", "lightning_peft"]]
)
def test_callback_of_the_working_folder_is_found(tmp_path, command):
    (tmp_path / "mycallbacks.py").write_text(CALLBACK)
    words = ["train", "model=tiny", "data.max_rows=8", "callbacks.mine._target_=mycallbacks.Mine", "dry_run=true"]
    run = subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
