"""A run folder is written by one run, and a run that says that it resumes, resumes."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from equal_runs import assert_equal_runs
from omegaconf import OmegaConf
from safetensors.torch import load_file
from started import run
from starts import ended, started
from tiny_runs import TINY, tiny_config

from lightning_peft.__main__ import main
from lightning_peft.checkpoint.resume import checkpoint_path, latest_checkpoint
from lightning_peft.commands.train import train
from lightning_peft.compose import compose_config
from lightning_peft.config import plain
from lightning_peft.runs.folder import check_saved_config, starting_config
from lightning_peft.runs.lock import LOCK, only_writer
from lightning_peft.training.preemption import PREEMPTED, Paused, Preempted

RUN = ["trainer.max_steps=6", "checkpoint.every_n_steps=2", "data.packing=false", "resume=auto"]
ROWS = [{"q": f"What is {n} plus {n}?", "a": str(2 * n)} for n in range(30)]
FILES = ["data=jsonl", "data.prompt_column=q", "data.completion_column=a", "data.validation_fraction=0.2"]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def signal_at(name: str, micro_batch: int) -> str:
    return f"+callbacks.signal={{_target_: signalling.SignalAt, name: {name}, micro_batch: {micro_batch}}}"


def stopped(run_dir: Path, *words: str, at: int = 3) -> Path:
    """Return a run that was preempted behind a step."""
    with pytest.raises(Preempted):
        train(tiny_config(run_dir, *RUN, *words, signal_at("SIGTERM", at)))
    return run_dir


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    train(tiny_config(run_dir, *RUN, "validation.every_n_steps=4"))
    return run_dir


@pytest.fixture
def everybodys_folder():
    """Yield a folder that other users reach, as those of pytest are not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.slow
def test_starts_in_one_second_take_folders_of_their_own(tmp_path):
    words = ["dry_run=false", "trainer.max_steps=1"]
    processes = [started(*words, f"seed={seed}", cwd=tmp_path) for seed in range(3)]
    texts = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], texts
    runs = sorted((tmp_path / "runs").iterdir())
    assert len(runs) == 3
    assert sorted(yaml.safe_load((run / "config.yaml").read_text())["seed"] for run in runs) == [0, 1, 2]


@pytest.mark.slow
def test_default_folder_of_a_wrong_start_is_not_left_behind(tmp_path):
    status, text = ended("data=jsonl", "data.train_path=absent.jsonl", cwd=tmp_path)
    assert status == 2 and "absent.jsonl" in text
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_second_start_of_a_folder_is_refused_and_changes_nothing(tmp_path):
    run_dir = stopped(tmp_path / "run")
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with only_writer(run_dir):
        status, text = ended(*RUN, f"run_dir={run_dir}", cwd=tmp_path)
        assert status == 2
        assert f"error: run_dir={run_dir}: process {os.getpid()} on " in text and text.count("\n") == 1
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_lock_is_gone_after_a_run(undisturbed):
    assert not (undisturbed / LOCK).exists()


def test_resume_without_a_folder_is_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="resume=auto: give run_dir=FOLDER, the run to go on with"):
        starting_config(["model=tiny", "resume=auto"])
    assert not list(tmp_path.iterdir())


def test_saved_line_names_the_words_to_go_on_with(tmp_path, caplog):
    caplog.set_level("INFO", "lightning_peft")
    run_dir = stopped(tmp_path / "run")
    assert f"SIGTERM: saved after step 4; the same command with run_dir={run_dir} resume=auto goes on" in caplog.text


@pytest.mark.parametrize("cut", ["one", "all"])
def test_damaged_checkpoints_are_never_a_fresh_start(tmp_path, undisturbed, cut):
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    (run_dir / "result.json").unlink()
    for path in sorted((run_dir / "checkpoints").glob("*.ckpt"))[-1 if cut == "one" else 0 :]:
        path.write_bytes(path.read_bytes()[:1000])
    words = [*RUN, "validation.every_n_steps=4"]
    if cut == "one":
        train(tiny_config(run_dir, *words))
        assert_equal_runs(run_dir, undisturbed)
        return
    with pytest.raises(ValueError, match="none of the 2 checkpoints there is whole: bring one back, or start afresh"):
        train(tiny_config(run_dir, *words))


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody whom permissions stop")
@pytest.mark.parametrize("what", ["files", "folder"])
def test_checkpoints_that_may_not_be_read_stop_the_run(everybodys_folder, undisturbed, what):
    folder = everybodys_folder / "checkpoints"
    shutil.copytree(undisturbed / "checkpoints", folder)
    for path in (folder,) if what == "folder" else folder.glob("*.ckpt"):
        path.chmod(0o300 if what == "folder" else 0)
    code = (
        "import os, sys, encodings.idna\nfrom pathlib import Path\n"
        "from lightning_peft.checkpoint.resume import latest_checkpoint\n"
        "os.setuid(65534)\ntry: latest_checkpoint(Path(sys.argv[1]))\nexcept Exception as e: print(type(e).__name__, e)"
    )
    printed = run([sys.executable, "-c", code, folder])
    expected = "PermissionError" if what == "folder" else "UnreadableCheckpoint"
    assert printed.stdout.startswith(expected) and "Permission denied" in printed.stdout, printed


def test_finished_run_answers_only_for_its_own_rows(tmp_path):
    path = write_rows(tmp_path / "r.jsonl", ROWS)
    words = [*RUN, *FILES, f"data.train_path={path}"]
    train(tiny_config(tmp_path / "run", *words))
    moved = write_rows(tmp_path / "moved.jsonl", ROWS)
    assert train(tiny_config(tmp_path / "run", *words, f"data.train_path={moved}"))["status"] == "finished"
    write_rows(path, [row | {"a": "no"} for row in ROWS])
    with pytest.raises(ValueError, match=r"run is finished, and its training rows are others now \(\w+, then"):
        train(tiny_config(tmp_path / "run", *words))
    path.unlink()
    assert train(tiny_config(tmp_path / "run", *words))["status"] == "finished"


@pytest.mark.slow
def test_changed_rows_are_one_line_before_the_model_is_loaded(tmp_path):
    path = write_rows(tmp_path / "r.jsonl", ROWS)
    words = [*RUN, *FILES, f"data.train_path={path}"]
    run_dir = stopped(tmp_path / "run", *words)
    write_rows(path, [row | {"a": "no"} for row in ROWS])
    status, text = ended(*words, f"run_dir={run_dir}", cwd=tmp_path)
    assert status == 2 and "Traceback" not in text
    assert "resumes, and its training rows are others now" in text
    assert "memory:" not in text


def test_run_goes_on_with_options_that_change_no_number(tmp_path, undisturbed):
    run_dir = stopped(tmp_path / "run", "validation.every_n_steps=4")
    changed = [
        "validation.every_n_steps=4", "checkpoint.every_n_steps=3", "checkpoint.keep_last=5",
        "trainer.log_every_n_steps=2", "validation.samples=0", "+trainer.enable_progress_bar=false",
        "data.num_workers=2",
    ]  # fmt: skip
    train(tiny_config(run_dir, *RUN, *changed))
    assert_equal_runs(run_dir, undisturbed)


@pytest.mark.parametrize(("every", "expected_steps"), [("3", {3, 6}), ("null", {6})])
def test_validations_may_come_more_often_or_not_at_all(tmp_path, undisturbed, every, expected_steps):
    run_dir = stopped(tmp_path / "run", "validation.every_n_steps=4", at=1)
    result = train(tiny_config(run_dir, *RUN, f"validation.every_n_steps={every}"))
    expected = json.loads((undisturbed / "result.json").read_text())
    assert (result["train_loss"], result["validation_loss"]) == (expected["train_loss"], expected["validation_loss"])
    adapters = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (run_dir, undisturbed)]
    assert all((adapters[0][name] == adapters[1][name]).all() for name in adapters[1])
    rows = list(csv.DictReader((run_dir / "metrics.csv").read_text().splitlines()))
    assert {int(row["step"]) for row in rows if row["validation_loss"]} == expected_steps


def test_option_that_is_newer_than_the_run_does_not_stop_it(tmp_path, undisturbed, caplog):
    caplog.set_level("INFO", "lightning_peft")
    run_dir = stopped(tmp_path / "run", "validation.every_n_steps=4")
    saved = yaml.safe_load((run_dir / "config.yaml").read_text())
    del saved["data"]["shuffle_window"], saved["claim"], saved["quantization"]["verify"]
    (run_dir / "config.yaml").write_text(yaml.safe_dump(saved))
    train(tiny_config(run_dir, *RUN, "validation.every_n_steps=4"))
    assert "option shuffle_window is newer than the run; it is 1000 now" in caplog.text
    assert_equal_runs(run_dir, undisturbed)


def test_trainer_option_given_later_is_still_a_change(tmp_path, undisturbed):
    with pytest.raises(ValueError, match=r"trainer.deterministic \(was not set, is True\)"):
        check_saved_config(tiny_config(tmp_path, *RUN, "+trainer.deterministic=true"), undisturbed)


def test_copied_folder_goes_on_in_the_copy(tmp_path):
    original = stopped(tmp_path / "a", "logger=tensorboard")
    copy = tmp_path / "b"
    shutil.copytree(original, copy)
    before = {path: path.read_bytes() for path in original.rglob("*") if path.is_file()}
    config = compose_config("train", [f"config_path={copy}/config.yaml"])
    config.callbacks = {}
    train(config)
    assert json.loads((copy / "result.json").read_text())["steps"] == 6
    assert len(list(csv.DictReader((copy / "metrics.csv").read_text().splitlines()))) >= 6
    assert {path: path.read_bytes() for path in original.rglob("*") if path.is_file()} == before


def test_a_paused_run_goes_on_as_its_last_line_says(tmp_path, capsys):
    words = ["model=tiny", "trainer.max_steps=4", "pause_at=2", "validation.samples=0", "callbacks={}"]
    assert main(["train", *words, f"run_dir={tmp_path}/run"]) == PREEMPTED
    said = capsys.readouterr().err
    assert f"run_dir={tmp_path}/run resume=auto goes on from there, with a later pause_at or null" in said
    saved = f"config_path={tmp_path}/run/config.yaml"
    assert main(["train", saved]) == 2
    assert "resume=auto continues it" in capsys.readouterr().err
    assert main(["train", saved, "resume=auto", "pause_at=null"]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 4


def test_end_before_the_checkpoint_is_refused(tmp_path):
    run_dir = stopped(tmp_path / "run")
    with pytest.raises(ValueError, match=r"trainer.max_steps=2: the run is at step 4 already \(.*step-00000004.ckpt\)"):
        train(tiny_config(run_dir, *RUN, "trainer.max_steps=2"))


def test_other_length_says_that_the_learning_rate_follows_another_curve(tmp_path, caplog):
    run_dir = stopped(tmp_path / "run")
    train(tiny_config(run_dir, *RUN, "trainer.max_steps=5"))
    assert "resume: trainer.max_steps was 6, is 5: schedule=cosine spans the whole run, so from" in caplog.text


def test_time_limit_pauses_a_run_that_later_ends_as_if_nothing_had_been(tmp_path, undisturbed):
    words = [*RUN, "validation.every_n_steps=4"]
    slow = "+callbacks.slow={_target_: signalling.PauseBeforeSteps, seconds: 0.4}"
    with pytest.raises(Paused) as left:
        train(tiny_config(tmp_path / "run", *words, "+trainer.max_time=00:00:00:01", slow))
    assert left.value.code == 75
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "paused" and 0 < result["steps"] < 6
    assert load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    while True:
        try:
            train(tiny_config(tmp_path / "run", *words, "+trainer.max_time=00:00:00:01", slow))
            break
        except Paused:
            continue
    assert_equal_runs(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("value", ["tomorrow", "00:00:00", "5"])
def test_wrong_time_limit_is_one_line(tmp_path, value):
    with pytest.raises(ValueError, match=rf"trainer.max_time={value}: must be DD:HH:MM:SS or HH:MM:SS"):
        train(tiny_config(tmp_path, *RUN, f"+trainer.max_time='{value}'"))


@pytest.mark.slow
def test_ctrl_c_saves_and_the_run_goes_on(tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    words = [*RUN, "validation.every_n_steps=4", f"run_dir={run_dir}"]
    slow = "+callbacks.slow={_target_: signalling.PauseBeforeSteps, seconds: 0.5}"
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent.parent / 'training'}"}
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_peft", "train", *TINY, *words, slow],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (run_dir / "metrics.csv").exists() or (run_dir / "metrics.csv").read_text().count("\n") < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 130, text
    assert "Traceback" not in text and f"run_dir={run_dir} resume=auto goes on from there" in text
    result = json.loads((run_dir / "result.json").read_text())
    assert result["status"] == "interrupted" and result["steps"] < 6
    assert latest_checkpoint(run_dir / "checkpoints") == checkpoint_path(run_dir / "checkpoints", result["steps"])
    train(tiny_config(run_dir, *RUN, "validation.every_n_steps=4"))
    assert_equal_runs(run_dir, undisturbed)


@pytest.mark.slow
def test_two_sweeps_do_not_share_a_folder(tmp_path):
    words = ["cluster=local", "trainer.max_steps=1", "sweep.parallel=1", f"sweep_dir={tmp_path / 'S'}"]
    submit = [sys.executable, "-m", "lightning_peft", "submit", "-m", *TINY]
    processes = [started(*words, f"adapter.rank={ranks}", cwd=tmp_path, command=submit) for ranks in ("2,4", "8,16")]
    texts = [process.communicate(timeout=300)[0] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2], texts
    (refused,) = [text for process, text in zip(processes, texts, strict=True) if process.returncode]
    assert "holds a sweep already" in refused or "writes it" in refused  # the first is done with it, or not yet
    manifest = json.loads((tmp_path / "S" / "sweep.json").read_text())
    names = {trial["name"] for trial in manifest["trials"]}
    assert names in ({"rank2", "rank4"}, {"rank8", "rank16"})
    ended("cancel", str(tmp_path / "S"), cwd=tmp_path, command=[sys.executable, "-m", "lightning_peft", "sweep"])
    assert {path.name for path in (tmp_path / "S").iterdir() if path.is_dir()} == names


def test_saved_config_of_an_earlier_version_names_its_loggers_by_their_former_modules(tmp_path):
    config = plain(compose_config("train", [*TINY, f"run_dir={tmp_path}", "logger=tensorboard"]))
    present = {name: node["_target_"] for name, node in config["logger"].items()}
    for node in config["logger"].values():
        node["_target_"] = node["_target_"].replace(".tracking.", ".training.")
    OmegaConf.save(OmegaConf.create(config), tmp_path / "config.yaml")
    restored = compose_config("train", [f"config_path={tmp_path}/config.yaml"])
    assert {name: node["_target_"] for name, node in restored.logger.items()} == present
    assert len(present) == 2
