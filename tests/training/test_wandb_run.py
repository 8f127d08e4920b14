"""Weights & Biases: everything a run logs, read back from its offline files; and training that goes on without it."""

import csv
import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import wandb
import yaml
from disks import fill, mounted
from lightning.pytorch import Callback
from tiny_runs import TINY, tiny_config
from wandb_records import offline_runs

from lightning_peft.commands.together import train_together
from lightning_peft.commands.train import train
from lightning_peft.tracking import wandb_run
from lightning_peft.tracking.charts import charts, extremes, sweep_name
from lightning_peft.tracking.git_state import git_state, without_credentials
from lightning_peft.tracking.loggers import RunLogger
from lightning_peft.tracking.service_record import service_record
from lightning_peft.tracking.wandb_run import WandbRun, id_of_user

pytestmark = pytest.mark.filterwarnings("ignore")  # these are wandb's own


@pytest.fixture(autouse=True)
def no_key_and_no_home(monkeypatch, tmp_path):
    for key in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def wandb_config(run_dir: Path, *overrides: str):
    return tiny_config(run_dir, "logger=wandb", "trainer.max_steps=3", *overrides)


def csv_rows(run_dir: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run_dir / "metrics.csv").read_text().splitlines()))


def checkout(folder: Path) -> str:
    """Make a git checkout with a change that is in no commit and a remote with a password; return the commit."""
    for words in (
        ["init", "-q", "-b", "main"], ["add", "notes.txt"],
        ["-c", "user.name=n", "-c", "user.email=e", "commit", "-q", "-m", "first"],
        ["remote", "add", "origin", "https://me:secret@example.org/me/code.git"],
    ):  # fmt: skip
        folder.mkdir(exist_ok=True)
        (folder / "notes.txt").write_text("first")
        subprocess.run(["git", "-C", str(folder), *words], check=True)
    (folder / "notes.txt").write_text("second")
    asked = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Train a run inside a sweep's folder; return it, and what W&B has of it."""
    sweep = tmp_path_factory.mktemp("sweeps") / "ranks"
    sweep.mkdir()
    (sweep / "sweep.json").write_text("{}")
    words = ["adapter.rank=4", "optimizer.lora_plus_ratio=4", "validation.every_n_steps=2", "data.max_rows=6"]
    words += ["validation.samples=2"]
    with pytest.MonkeyPatch.context() as patch:
        for key in ("WANDB_API_KEY", "WANDB_MODE"):
            patch.delenv(key, raising=False)
        patch.setenv("HOME", str(sweep.parent / "home"))
        checkout(sweep.parent / "code")
        patch.chdir(sweep.parent / "code")
        (sweep / "rank4").mkdir()
        (sweep / "rank4" / "log.txt").write_text("what a trial prints")
        logging.getLogger("lightning_peft").setLevel(logging.INFO)
        result = train(wandb_config(sweep / "rank4", *words))
        logging.getLogger("lightning_peft").setLevel(logging.NOTSET)
    (run,) = offline_runs(sweep / "rank4")
    return sweep / "rank4", run, result


def test_run_says_what_it_is(finished):
    run_dir, run, result = finished
    assert (run.id, run.group, run.job_type) == (service_record(run_dir, "wandb")["id"], "ranks", "train")
    assert (run.project, run.name) == ("lightning-peft", "rank4")
    assert set(run.tags) == {"lora", "tiny"} and run.exit_code == 0
    saved = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert {key: run.config[key] for key in saved} == saved
    assert run.config["trainable_parameters"] == result["trainable_parameters"]


def test_run_has_its_log_and_the_commit_it_was_started_from(finished):
    run_dir, run, _ = finished
    assert run.files["log.txt"] == "what a trial prints" and set(run.files) == {"log.txt", "output.log"}
    assert "INFO" in run.files["output.log"] and "step 3/3" in run.files["output.log"]
    code = run_dir.parent.parent / "code"
    state = git_state(code)
    assert run.config["git"] == state and state["dirty"] is True and state["branch"] == "main"
    assert run.git == (state["commit"], state["remote"]) and state["remote"] == "https://example.org/me/code.git"


def test_where_there_is_no_git_nothing_is_recorded(tmp_path, monkeypatch):
    assert git_state(tmp_path) is None
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert git_state(tmp_path) is None  # no commit yet
    checkout(tmp_path / "code")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path / "code") is None


def test_remote_loses_what_is_secret():
    assert without_credentials("https://ghp_token@github.com:443/a/b") == "https://github.com:443/a/b"
    assert without_credentials("git@github.com:a/b.git") == "git@github.com:a/b.git"
    assert without_credentials("/srv/git/b.git") == "/srv/git/b.git"


def test_runs_that_train_together_have_a_run_each(tmp_path):
    configs = [wandb_config(tmp_path / name, f"adapter.rank={name}", "trainer.max_steps=2") for name in ("2", "4")]
    assert train_together(configs, tmp_path / "list.txt") == 0
    for name in ("2", "4"):
        (run,) = offline_runs(tmp_path / name)
        assert run.config["adapter"]["rank"] == int(name) and run.exit_code == 0
        assert [step for step, _ in run.scalars("train/loss")] == [1, 2]
        assert run.artifacts


@pytest.mark.parametrize("how", ["abandons", pytest.param("finds no server", marks=pytest.mark.slow)])
def test_run_beside_one_that_fails_goes_on(tmp_path, monkeypatch, how):
    monkeypatch.setattr("lightning_peft.tracking.wandb_run.SETTINGS", wandb_run.SETTINGS | {"init_timeout": 2})
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    wandb.teardown()  # wandb reads the environment when the first run of a process starts
    kept = WandbRun(str(tmp_path / "kept"), "p", mode="offline")
    kept.start_at(0)
    kept.log_metrics({"loss": 3.0}, step=1)
    failing = WandbRun(str(tmp_path / "failing"), "p", mode="offline" if how == "abandons" else "online")
    failing.start_at(0)
    failing.log_metrics({"loss": 5.0}, step=1)
    if how == "abandons":
        failing.abandon()
    else:
        failing.close("finished", tmp_path / "adapter")
        assert offline_runs(tmp_path / "failing")[0].scalars("train/loss") == [(1, 5.0)]
    kept.log_metrics({"loss": 2.0}, step=2)
    kept.close("finished", tmp_path / "adapter")
    (run,) = offline_runs(tmp_path / "kept")
    assert run.scalars("train/loss") == [(1, 3.0), (2, 2.0)] and run.exit_code == 0
    assert not kept.failed
    wandb.teardown()


def test_wandb_csv_and_tensorboard_get_the_same_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = tmp_path / "run"
    tensorboard = "+logger.tensorboard={_target_: lightning_peft.tracking.loggers.TensorBoard, run_dir: '${run_dir}'}"
    train(wandb_config(run_dir, tensorboard, "optimizer.lora_plus_ratio=4"))
    (run,) = offline_runs(run_dir)
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    rows = csv_rows(run_dir)
    wanted = {"loss", "grad_norm", "lr", "lr/A", "lr/B", "tokens_per_second", "peak_memory_gib", "rank", "alpha"}
    assert wanted | {"trainable_parameters", "validation_loss"} <= set(rows[0])
    for key in set(rows[0]) - {"step"}:
        ours = [(int(row["step"]), float(row[key])) for row in rows if row[key]]
        theirs = [[(event.step, event.value) for event in events.Scalars(key)]]
        if key not in ("rank", "alpha", "trainable_parameters"):
            theirs.append(run.scalars("validation/loss" if key == "validation_loss" else f"train/{key}"))
        for points in theirs:
            assert [step for step, _ in points] == [step for step, _ in ours], key
            # TensorBoard keeps fp32.
            assert [v for _, v in points] == pytest.approx([v for _, v in ours], rel=1e-6, abs=1e-12), key


def test_learning_rates_of_lora_plus_differ_by_the_ratio(finished):
    run_dir, run, _ = finished
    for (_, rate_A), (_, rate_B) in zip(run.scalars("train/lr/A"), run.scalars("train/lr/B"), strict=True):
        assert rate_B == pytest.approx(4 * rate_A)


def test_charts_have_prefixes_and_none_is_constant(finished):
    _, run, _ = finished
    names = {key for row in run.rows for key in row if not key.startswith(("_", "samples"))}
    assert {name.partition("/")[0] for name in names} == {"train", "validation", "trainer"}
    constant = {"train/rank", "train/alpha", "train/trainable_parameters", "rank", "alpha", "trainable_parameters"}
    assert not names & constant
    epochs = [epoch for _, epoch in run.scalars("train/epoch")]
    assert 0 < epochs[0] < epochs[1] < epochs[2]


def test_losses_of_a_mixture_are_charts_beside_the_loss():
    row = {"validation_loss": 1.0, "validation_loss/sql": 2.0, "exact_match": 0.5}
    assert charts(row) == {"validation/loss": 1.0, "validation/loss/sql": 2.0, "validation/exact_match": 0.5}


def test_tokens_are_counted_over_the_steps(finished):
    run_dir, run, _ = finished
    tokens = [int(row["tokens"]) for row in csv_rows(run_dir) if row["tokens"]]
    assert [total for _, total in run.scalars("train/total_tokens")] == [sum(tokens[: n + 1]) for n in range(3)]


def test_summary_has_what_the_result_says(finished):
    run_dir, run, result = finished
    for key in ("steps", "trainable_parameters", "peak_memory_gib", "data"):
        assert run.summary[key] == pytest.approx(result[key])
    assert run.summary["status"] == "finished" and run.summary["data"]["rows"] == 6
    losses = [float(row["validation_loss"]) for row in csv_rows(run_dir) if row["validation_loss"]]
    found = [run.summary[key] for key in ("validation/loss", "validation/loss.min", "validation/loss.max")]
    assert found == pytest.approx([losses[-1], min(losses), max(losses)]) and len(losses) == 2


def test_smallest_and_largest_are_of_what_every_start_has_validated(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "step,loss,validation_loss,exact_match,validation_loss/sql\n1,5.0,,,\n2,,3.0,0.5,9.0\n3,2.0,,,\n4,,4.0,0.75,\n"
        "6,,nan,,\n8,,3.5,0.25,7.0\n9,,0.1,0.1,0.1,0.1\n10,,0.0"
    )
    expected = {"loss": (3.0, 4.0), "exact_match": (0.25, 0.75), "loss/sql": (7.0, 9.0)}
    assert extremes(tmp_path) == {
        f"validation/{name}.{end}": value
        for name, both in expected.items()
        for end, value in zip(("min", "max"), both, strict=True)
    }
    assert extremes(tmp_path / "nothing") == {}
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("\n" + "1" * 200_000 + ",,0.1,0.1,0.1\n")
    assert extremes(tmp_path)["validation/loss.min"] == 3.0


def test_diverged_run_is_an_alert(tmp_path):
    with pytest.raises(SystemExit):
        train(wandb_config(tmp_path / "run", "optimizer.lr=1e30", "data.packing=false"))
    (run,) = offline_runs(tmp_path / "run")
    assert run.alerts == ["run diverged"] and run.summary["status"] == "diverged" and run.exit_code == 1


def test_adapter_is_an_artifact_with_its_lineage(finished):
    run_dir, run, _ = finished
    (artifact,) = [artifact for artifact in run.artifacts if artifact.type == "adapter"]
    assert json.loads(artifact.metadata) == json.loads((run_dir / "adapter" / "lineage.json").read_text())
    files = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    assert set(files) == {path.name for path in (run_dir / "adapter").iterdir()}
    assert set(artifact.aliases) == {"latest", "step-3"}


def test_samples_are_a_table_of_base_and_adapter(finished):
    run_dir, run, _ = finished
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    (row,) = [row for row in run.rows if "samples/path" in row]
    table = json.loads((folder / "files" / row["samples/path"]).read_text())
    assert table["columns"] == ["step", "prompt", "base", "answer", "reference"]
    lines = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert table["data"] == [list(line.values()) for line in lines]
    assert row["trainer/global_step"] == 2 and len(lines) == 2


class Fail(Callback):
    """Ends the training with an error after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise RuntimeError("stopped")


def test_resumed_run_keeps_its_id_and_repeats_no_step(tmp_path):
    words = ["checkpoint.every_n_steps=2", "resume=auto", "trainer.max_steps=5"]
    fail = "+callbacks.fail={_target_: test_wandb_run.Fail, step: 3}"
    with pytest.raises(RuntimeError, match="stopped"):
        train(wandb_config(tmp_path / "run", *words, fail))
    train(wandb_config(tmp_path / "run", *words))
    first, second = offline_runs(tmp_path / "run")
    assert first.id == second.id and (first.exit_code, second.exit_code) == (1, 0)
    steps = [[step for step, _ in run.scalars("train/loss")] for run in (first, second)]
    # The failed start logged steps up to the checkpoint's flush and the error; what is written is not written again.
    assert steps[0] + steps[1] == [1, 2, 3, 4, 5]


def test_preempted_run_is_marked(tmp_path):
    run = WandbRun(str(tmp_path), "p", mode="offline")
    run.start_at(0)
    run.log_metrics({"loss": 1.0}, step=1)
    run.close("preempted", tmp_path / "adapter")
    (written,) = offline_runs(tmp_path)
    assert written.preempting and written.exit_code == 1 and written.scalars("train/loss") == [(1, 1.0)]


WORDS_OF_AGENT = ["logger=wandb", "trainer.max_steps=2", *TINY[:4], "trainer.accelerator=cpu"]


class KillCore(Callback):
    """SIGKILLs wandb's service after the first step, as a cluster does with all processes of a step."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 1:
            processes = [found for found in gc.get_objects() if type(found) is subprocess.Popen]
            running = [found for found in processes if "wandb-core" in str(found.args) and found.poll() is None]
            assert running
            for service in running:
                service.kill()
                service.wait()  # wandb would not, and the interpreter warns of it in a later test


def test_training_outlives_a_killed_wandb_core(tmp_path, caplog):
    kill = "+callbacks.kill={_target_: test_wandb_run.KillCore}"
    result = train(wandb_config(tmp_path / "run", kill))
    assert result["status"] == "finished" and len(csv_rows(tmp_path / "run")) == 4
    assert [r.message for r in caplog.records if "training goes on" in r.message and r.message.startswith("wandb")]


def test_rows_that_a_killed_wandb_core_lost_are_logged_by_the_next_start(tmp_path):
    words = ["checkpoint.every_n_steps=2", "resume=auto", "trainer.max_steps=5"]
    kill = "+callbacks.kill={_target_: test_wandb_run.KillCore}"
    fail = "+callbacks.zfail={_target_: test_wandb_run.Fail, step: 3}"
    with pytest.raises(RuntimeError, match="stopped"):
        train(wandb_config(tmp_path / "run", *words, kill, fail))
    train(wandb_config(tmp_path / "run", *words))
    *lost, run = offline_runs(tmp_path / "run")
    assert not any(start.rows for start in lost)
    rows = csv_rows(tmp_path / "run")
    for key, chart in (("loss", "train/loss"), ("lr", "train/lr"), ("validation_loss", "validation/loss")):
        assert run.scalars(chart) == [(int(row["step"]), float(row[key])) for row in rows if row[key]]
    assert [step for step, _ in run.scalars("train/loss")] == [1, 2, 3, 4, 5]


def test_rows_that_outlived_a_killed_trainer_are_not_logged_again(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_peft.tracking.wandb_run.FLUSH_SECONDS", 0)
    (tmp_path / "metrics.csv").write_text("step,loss\n1,4.0\n2,3.0\n3,2.0\n4,1.0\n")
    killed = WandbRun(str(tmp_path), "p", mode="offline")
    killed.start_at(0)
    for step in range(1, 5):
        killed.log_metrics({"loss": 5.0 - step}, step=step)
    wandb.teardown()  # the service writes what it was given; the trainer had no time for its last words

    resumed = WandbRun(str(tmp_path), "p", mode="offline")
    resumed.start_at(4)
    resumed.close("finished", tmp_path / "adapter")
    first, second = offline_runs(tmp_path)
    assert first.scalars("train/loss") == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]
    assert second.scalars("train/loss") == [(4, 1.0)]  # the last is not known to be written


@pytest.mark.slow
def test_training_outlives_a_server_that_is_down(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("lightning_peft.tracking.wandb_run.SERVER_SECONDS", 2)
    result = train(wandb_config(tmp_path / "run"))
    (run,) = offline_runs(tmp_path / "run")
    assert result["status"] == "finished" and [step for step, _ in run.scalars("train/loss")] == [1, 2, 3]
    assert sum("wandb: no server" in record.message for record in caplog.records) == 1


@pytest.fixture
def small_disk(tmp_path):
    """Mount an empty `wandb` folder in a run folder, on a disk of 64 KiB."""
    with mounted(tmp_path / "run" / "wandb", lazy=True) as folder:  # wandb's service still has its log open
        yield folder


class FillDisk(Callback):
    """Fills a folder's disk after the first step."""

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 1:
            fill(self.folder / "filler")


@pytest.mark.slow
@pytest.mark.parametrize("when", ["at the start", "while training"])
def test_training_outlives_a_full_disk(small_disk, tmp_path, when):
    expected = train(wandb_config(tmp_path / "undisturbed"))
    words = []
    if when == "at the start":
        fill(small_disk / "filler")
    else:
        words = [f"+callbacks.fill={{_target_: test_wandb_run.FillDisk, folder: '{small_disk}'}}"]
    result = train(wandb_config(tmp_path / "run", *words))
    assert os.statvfs(small_disk).f_bavail == 0
    assert (result["status"], result["train_loss"]) == ("finished", expected["train_loss"])
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    losses = [[row["loss"] for row in csv_rows(tmp_path / name)] for name in ("run", "undisturbed")]
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "cloud"}, "logger.wandb.mode='cloud': must be auto, online, offline or disabled"),
        ({"projekt": "p"}, "logger.wandb.projekt: wandb.init has no such argument"),
        ({"id": "x"}, "id, dir and resume follow from run_dir"),
    ],
)
def test_wrong_option_is_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        WandbRun(str(tmp_path), "p", **options)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("WANDB_MODE", "ofline", "WANDB_MODE=ofline: must be one of online, offline, disabled"),
        ("WANDB_PROJECT", "team/mine", "WANDB_PROJECT=team/mine: W&B takes no / in it"),
        ("WANDB_RUN_ID", "a:b#", "WANDB_RUN_ID=a:b#: W&B takes no # : in it"),
    ],
)
def test_variable_that_would_end_the_logging_is_refused_before_the_run(tmp_path, monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        train(wandb_config(tmp_path / "run", "dry_run=true"))
    assert not (tmp_path / "run").exists()


def test_variables_win_over_defaults_and_a_home_is_not_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/proc")  # nobody can make a folder there
    monkeypatch.delenv("WANDB_DATA_DIR", raising=False)  # a run of another test that was never ended left it
    variables = {"PROJECT": "mine", "NAME": "called", "TAGS": "a,b", "RUN_GROUP": "ours", "JOB_TYPE": "sweep"}
    for key, value in variables.items():
        monkeypatch.setenv(f"WANDB_{key}", value)
    (tmp_path / "multirun.yaml").touch()  # the sweep's name could be the group then
    train(wandb_config(tmp_path / "run", "validation.every_n_steps=2", "validation.samples=1"))
    (run,) = offline_runs(tmp_path / "run")
    assert (run.project, run.name, run.group, run.job_type) == ("mine", "called", "ours", "sweep")
    assert set(run.tags) == {"a", "b"}
    assert len(run.scalars("train/loss")) == 3 and len(run.scalars("samples/path")) == 1
    assert "WANDB_DATA_DIR" not in os.environ


def test_id_and_place_of_the_user_are_taken_and_no_two_trials_share_an_id(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_RUN_ID", "mine42")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "scratch"))
    train(wandb_config(tmp_path / "run"))
    (run,) = offline_runs(tmp_path / "scratch")
    assert run.id == "mine42" == service_record(tmp_path / "run", "wandb")["id"]
    assert not list((tmp_path / "run").glob("wandb/offline-run-*"))
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").touch()
    ids = {id_of_user(tmp_path / "sweep" / name) for name in ("rank4", "rank8")}
    assert (
        ids == {None} and "WANDB_RUN_ID=mine42 is of one run; each trial of sweep has an id of its own" in caplog.text
    )


@pytest.mark.parametrize(
    ("variables", "mode"),
    [
        ({"WANDB_DISABLED": "true"}, "disabled"),
        ({"WANDB_DISABLED": "false"}, "offline"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
        ({"WANDB_MODE": ""}, "offline"),
        ({"WANDB_MODE": "online", "WANDB_DISABLED": "1"}, "disabled"),
    ],
)
def test_mode_is_the_users(tmp_path, monkeypatch, variables, mode):
    for name in ("WANDB_MODE", "WANDB_DISABLED", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert WandbRun(str(tmp_path)).mode == mode


def test_what_is_typed_wins_over_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert WandbRun(str(tmp_path), project="typed").options["project"] == "typed"
    assert WandbRun(str(tmp_path)).options["project"] == "mine"


class NoSamples(RunLogger):
    """Cannot write tables."""

    name = "half"

    def __init__(self, run_dir: str):
        super().__init__(run_dir)
        self.steps: list[int] = []

    def write_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.steps.append(step)

    def write_samples(self, columns: list[str], rows: list[list[object]], step: int) -> None:
        raise PermissionError("no place")


def test_table_that_fails_does_not_end_the_scalars(tmp_path, caplog):
    half = NoSamples(str(tmp_path))
    for step in (1, 2):
        half.log_samples(["prompt"], [["a"]], step)
        half.log_metrics({"loss": 1.0}, step)
    assert half.steps == [1, 2]
    assert [r.message for r in caplog.records] == ["half: PermissionError (no place); no more samples are logged there"]


USER_WITHOUT_HOME = """
import os
from lightning_peft.tracking.wandb_run import has_wandb_key
from lightning_peft.user_cache import user_cache
os.setuid(4711)
for key in ("HOME", "XDG_CACHE_HOME", "WANDB_API_KEY", "NETRC"):
    os.environ.pop(key, None)
print(has_wandb_key(), user_cache())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which takes root")
def test_user_without_a_home_has_no_key_and_a_cache_for_the_time_being():
    run = subprocess.run([sys.executable, "-c", USER_WITHOUT_HOME], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", f"{tempfile.gettempdir()}/lightning_peft-4711"]


def test_run_outside_a_sweep_has_no_group(tmp_path):
    assert sweep_name(tmp_path / "run") is None
    (tmp_path / "multirun.yaml").touch()
    assert sweep_name(tmp_path / "run") == tmp_path.name


def test_command_of_a_wandb_agent_is_one_of_its_trials(tmp_path, monkeypatch):
    """The agent's own code makes the command line; what it sets for the process decides run and sweep."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    macro = ["${interpreter}", "-m", "lightning_peft", "train", *WORDS_OF_AGENT, "${args_no_hyphens}"]
    parameters = {"adapter.rank": {"value": 4}, "optimizer.lr": {"value": 0.002}}
    filled = create_sweep_command_args({"args": parameters})["args_no_hyphens"]
    command = [part for word in create_sweep_command(macro) for part in (filled if "args_no" in word else [word])]
    command = [sys.executable if "interpreter" in word else word for word in command]
    (tmp_path / "parameters.yaml").write_text(yaml.safe_dump({"wandb_version": 1, **parameters}))
    variables = {
        "WANDB_SWEEP_ID": "sweep123",
        "WANDB_RUN_ID": "run456",
        "WANDB_SWEEP_PARAM_PATH": str(tmp_path / "parameters.yaml"),
        "WANDB_MODE": "offline",
        "WANDB_PROJECT": "theirs",
    }
    done = subprocess.run(
        [*command, f"run_dir={tmp_path}/run"], env=os.environ | variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (run,) = offline_runs(tmp_path / "run")
    assert (run.id, run.project) == ("run456", "theirs")
    assert run.config["adapter"]["rank"] == 4 and run.scalars("train/loss")
    assert service_record(tmp_path / "run", "wandb")["id"] == "run456"
