"""The content of a sweep's file and folders: states, processes, draws, tables."""

import csv
import errno
import fcntl
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import lightning_peft
from lightning_peft.__main__ import main
from lightning_peft.cluster.job import Job
from lightning_peft.cluster.process import Process, process, this_process
from lightning_peft.cluster.slurm import BEGUN, Slurm, exit_status
from lightning_peft.commands.sweep import print_trials
from lightning_peft.schemas import trial_name
from lightning_peft.sweeps import change_lock
from lightning_peft.sweeps.change_lock import locked
from lightning_peft.sweeps.search import SweepConfig
from lightning_peft.sweeps.sweep import (
    Sweep,
    Trial,
    changed_sweep,
    read_sweep,
    refresh,
    state_of,
    write_sweep,
)
from lightning_peft.sweeps.table import (
    best_trial,
    csv_text,
    heat_map,
    html_text,
    json_text,
    svg_text,
    table_rows,
)

DEAD = Process(2**22 + 1, 0, socket.gethostname())
FINISHED, PREEMPTED, FAILED = ({"status": status} for status in ("finished", "preempted", "failed"))


def job(state: str) -> Job:
    return Job("7_0", state, 0, 0)


@pytest.mark.parametrize(
    ("trial", "job", "has_worker", "state"),
    [
        (Trial("t", []), None, True, "waiting"),
        (Trial("t", []), None, False, "lost"),
        (Trial("t", [], is_waiting=False, process=this_process()), None, True, "running"),
        (Trial("t", [], is_waiting=False, process=this_process()), None, False, "running"),
        (Trial("t", [], is_waiting=False, process=DEAD), None, True, "lost"),
        (Trial("t", [], is_waiting=False, process=DEAD, exit_code=0), None, True, "lost"),
        (Trial("t", [], is_waiting=False, process=DEAD, exit_code=-9), None, True, "failed"),
        (Trial("t", [], is_waiting=False, exit_code=2), None, True, "failed"),
        (Trial("t", [], is_waiting=False, result=FINISHED, process=DEAD), None, False, "finished"),
        (Trial("t", [], is_waiting=False, result=FAILED, exit_code=0), None, False, "failed"),
        (Trial("t", [], is_waiting=False, result=PREEMPTED, exit_code=75), None, False, "preempted"),
        (Trial("t", [], is_waiting=False, result=PREEMPTED, is_cancelled=True), None, False, "cancelled"),
        (Trial("t", [], is_waiting=False, is_cancelled=True, result=FINISHED), None, False, "finished"),
        (Trial("t", [], is_waiting=False), job("PENDING"), False, "waiting"),
        (Trial("t", [], is_waiting=False, result=PREEMPTED), job("PENDING"), False, "waiting"),
        (Trial("t", [], is_waiting=False), job("RUNNING"), False, "running"),
        (Trial("t", [], is_waiting=False, result=FAILED), job("COMPLETED"), False, "failed"),
        (Trial("t", [], is_waiting=False, exit_code=0), job("COMPLETED"), False, "lost"),
        (Trial("t", [], is_waiting=False), job("OUT_OF_MEMORY"), False, "failed"),
        (Trial("t", [], is_waiting=False), job("CANCELLED"), False, "cancelled"),
        (Trial("t", [], is_waiting=False, job_state="CANCELLED"), None, False, "cancelled"),
        (Trial("t", [], is_waiting=False, state="cancelled"), None, False, "cancelled"),  # of a manifest of before
        (Trial("t", [], is_waiting=False, state="cancelled", job_state="FAILED"), None, False, "failed"),
        (Trial("t", [], is_waiting=False), job("PREEMPTED"), False, "preempted"),
        (Trial("t", [], is_waiting=False), job("NODE_FAIL"), False, "lost"),
        (Trial("t", [], is_waiting=False, job_state="NODE_FAIL", exit_code=143), None, False, "lost"),
        (Trial("t", [], is_waiting=False, job_state="TIMEOUT"), None, False, "failed"),
        (Trial("t", [], is_waiting=False, result=PREEMPTED), job("NODE_FAIL"), False, "preempted"),
    ],
)
def test_state_follows_from_what_is_seen(trial, job, has_worker, state):
    assert state_of(trial, job, has_worker) == state


def test_task_that_is_gone_without_a_mark_was_cancelled_before_it_began(tmp_path, monkeypatch):
    """No accounts are kept, and the logs may lie anywhere: the mark is the batch script's own."""
    (tmp_path / "sacct").write_text("#!/bin/sh\necho Slurm accounting storage is disabled >&2\nexit 1\n")
    (tmp_path / "sacct").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = {job_id: Job(job_id, state, 0, 0) for job_id, state in (("7_0", "RUNNING"), ("7_3", "PENDING"))}
    tasks = ["7_0", "7_1", "7_2", "7_3", "8_0"]  # nothing is known of array 8
    assert Slurm().recall(tasks, found, tmp_path) == {}, "its script leaves no marks"
    (tmp_path / BEGUN).mkdir()
    (tmp_path / BEGUN / "8").touch()
    assert Slurm().recall(tasks, found, tmp_path) == {}, "only a later array's script leaves marks"
    (tmp_path / BEGUN / "7").touch()
    (tmp_path / BEGUN / "7_0").touch()
    (tmp_path / BEGUN / "7_2").touch()  # it began, and was forgotten
    assert Slurm().recall(tasks, found, tmp_path) == {"7_1": Job("7_1", "CANCELLED", 0, 0)}


def test_exit_status_is_as_bash_has_it():
    """SLURM writes 125 for the signal where the memory was too small: Linux kills, by signal 9."""
    said = {"0:0": 0, "3:0": 3, "1:15": 1, "0:9": 137, "0:15": 143, "0:125": 137}
    assert {text: exit_status(text) for text in said} == said


def test_process_that_ended_is_not_alive_even_before_it_is_waited_for():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    seen = process(child.pid)
    assert seen.is_alive
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not seen.is_alive
    child.wait()
    assert not Process(os.getpid(), seen.started, seen.host).is_alive, "another process with the same number"


def test_process_of_another_machine_is_taken_to_live_until_that_is_gone(tmp_path):
    afar = Process(DEAD.pid, 1, "login1")
    running = Trial("b", ["b=1"], is_waiting=False, process=afar)
    done = Trial("a", ["b=2"], is_waiting=False, process=afar)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "result.json").write_text('{"status": "finished"}')
    sweep = Sweep([], ["b=1,2"], "local", "train_loss", trials=[running, done], workers=[afar])
    refresh(sweep, tmp_path, {})
    assert ([running.state, done.state], sweep.other_machines()) == (["running", "finished"], "login1")
    with pytest.raises(ValueError, match="gone=login3: no process of the sweep is on it; they are on login1"):
        sweep.forget_machine("login3")
    sweep.forget_machine("login1")
    refresh(sweep, tmp_path, {})
    assert ([running.state, done.state], sweep.other_machines(), sweep.workers) == (["lost", "finished"], "", [])


def test_verbs_answer_on_another_machine(tmp_path, capsys):
    trial = Trial("b", ["b=1"], is_waiting=False, process=Process(1, 1, "login1"))
    write_sweep(Sweep([], ["b=1"], "local", "train_loss", count=1, trials=[trial]), tmp_path)
    assert main(["sweep", "status", str(tmp_path)]) == main(["sweep", "table", str(tmp_path)]) == 0
    assert "taken to run on login1" in capsys.readouterr().out
    for words in (["cancel"], ["retry", "failed=true"]):
        assert main(["sweep", words[0], str(tmp_path), *words[1:]]) == 2
        assert "gone=NAME" in capsys.readouterr().err
    assert main(["sweep", "cancel", str(tmp_path), "gone=login1"]) == 0
    assert read_sweep(tmp_path).trials[0].state == "lost"


@pytest.mark.parametrize("word", ["optimizer.lr=1e-3", "++optimizer.lr=1e-3", "rank=8", "adapter.rank=8"])
def test_retry_leaves_swept_values_to_the_trials(word, tmp_path, capsys):
    """Its trial would be ranked, and its picture drawn, by a value that it was not trained with."""
    trial = Trial("b", ["adapter.rank=4", "optimizer.lr=1e30"], "diverged", is_waiting=False)
    swept = ["adapter.rank=4,8", "optimizer.lr=1e30,1e-3"]
    write_sweep(Sweep([], swept, "local", "validation_loss", count=1, trials=[trial]), tmp_path)
    before = (tmp_path / "sweep.json").read_text()
    assert main(["sweep", "retry", str(tmp_path), "trials=[b]", "data.micro_batch_size=1", word]) == 2
    key = word.lstrip("+").partition("=")[0]
    assert f"error: {word}: {key} is swept, so each trial keeps its own; submit other" in capsys.readouterr().err
    assert (tmp_path / "sweep.json").read_text() == before


def test_sweep_has_one_folder(tmp_path, capsys):
    words = [f"run_dir={tmp_path}/a", f"sweep_dir={tmp_path}/b"]
    assert main(["submit", "-m", "cluster=local", "model=tiny", "adapter.rank=2,4", *words]) == 2
    assert f"error: {' '.join(words)}: each names the sweep's folder; give one" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_worker_of_a_sweep_that_was_moved_leaves_with_a_line(tmp_path):
    worker = [sys.executable, "-m", "lightning_peft.sweeps.local_worker", str(tmp_path), "0"]
    done = subprocess.run(worker, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith(f"error: {tmp_path}: holds no sweep.json") and done.stderr.count("\n") == 1


def test_half_written_result_is_none(tmp_path):
    sweep = Sweep(["a=1"], ["b=1,2"], "local", "loss", trials=[Trial("t", ["b=1"], is_waiting=False)])
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "result.json").write_text('{"status": "fini')
    refresh(sweep, tmp_path, {})
    assert (sweep.trials[0].state, sweep.trials[0].result) == ("lost", None)


def test_file_reads_back_equal_and_is_kept_when_a_change_fails(tmp_path):
    sweep = Sweep(["a=1"], ["b=1,2"], "local", "loss", trials=[Trial("t", ["b=1"], process=DEAD)], workers=[DEAD])
    write_sweep(sweep, tmp_path)
    assert read_sweep(tmp_path) == sweep
    with pytest.raises(KeyError), changed_sweep(tmp_path) as changed:
        changed.trials.clear()
        raise KeyError
    assert read_sweep(tmp_path) == sweep


def test_folder_without_a_sweep_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no sweep.json"), changed_sweep(tmp_path / "none"):
        pass
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parallel": 0}, "sweep.parallel=0"),
        ({"seed": -1}, "sweep.seed=-1: must be 0 or more"),
        ({"trials": 3}, "sweep.trials=3: a grid has all its combinations"),
        ({"search": "random"}, "sweep.search=random: needs sweep.trials"),
    ],
)
def test_wrong_sweep_option_is_named(options, message):
    from omegaconf import OmegaConf

    with pytest.raises(ValueError, match=message):
        OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SweepConfig), options))


@pytest.fixture
def rank_by_alpha():
    """Return four trials, of which the last failed; the loss is rank x alpha."""
    trials = []
    for rank in (4, 16):
        for alpha in (8, 32):
            result = {"status": "finished", "validation_loss": float(rank * alpha), "steps": 2, "metrics": {}}
            words = [f"adapter.rank={rank}", f"adapter.alpha={alpha}"]
            trials.append(Trial(f"rank{rank}_alpha{alpha}", words, "finished", 1, result=result))
    trials[3].state, trials[3].result, trials[3].exit_code = "failed", {"status": "failed"}, 1
    return Sweep([], ["adapter.rank=4,16", "adapter.alpha=8,32"], "local", "validation_loss", trials=trials)


def test_table_is_sorted_and_trials_without_the_number_come_last(rank_by_alpha):
    assert [row["validation_loss"] for row in table_rows(rank_by_alpha, "validation_loss")] == [32, 128, 128, None]
    assert [row["alpha"] for row in table_rows(rank_by_alpha, "-alpha")] == [32, 32, 8, 8]
    with pytest.raises(ValueError, match="sort=loss: no such column; choose one of trial, rank, alpha"):
        table_rows(rank_by_alpha, "loss")


def test_best_is_of_the_finished_and_by_the_sign_of_the_metric(rank_by_alpha):
    assert best_trial(rank_by_alpha) == ("rank4_alpha8", 32)
    rank_by_alpha.metric = "-validation_loss"
    assert best_trial(rank_by_alpha)[1] == 128
    rank_by_alpha.metric = "accuracy"
    assert best_trial(rank_by_alpha) is None


def test_numbers_that_are_not_finite_are_never_ranked(rank_by_alpha):
    for trial, value in zip(rank_by_alpha.trials, (float("nan"), 128.0, float("-inf")), strict=False):
        trial.result["validation_loss"] = value
    assert best_trial(rank_by_alpha) == ("rank4_alpha32", 128)
    rank_by_alpha.metric = "-validation_loss"
    assert best_trial(rank_by_alpha) == ("rank4_alpha32", 128)
    for sort in ("validation_loss", "-validation_loss"):
        assert table_rows(rank_by_alpha, sort)[0]["trial"] == "rank4_alpha32"
    assert heat_map(rank_by_alpha).cells == {(4, 32): 128}
    text = json_text(table_rows(rank_by_alpha, "validation_loss"))
    assert [row["validation_loss"] for row in json.loads(text, parse_constant=pytest.fail)] == [128, None, None, None]
    assert ">nan<" in html_text(table_rows(rank_by_alpha, "validation_loss"), None)


def test_heat_map_says_what_a_third_key_was_folded_into(rank_by_alpha):
    for trial in rank_by_alpha.trials:
        trial.overrides.append("optimizer.lr=0.1")
    rank_by_alpha.swept.append("optimizer.lr=0.1,0.2")
    picture = ElementTree.fromstring(svg_text(heat_map(rank_by_alpha)))
    assert next(picture.iter("{http://www.w3.org/2000/svg}text")).text == "validation_loss, best over lr"


def test_keys_with_one_last_part_have_columns_of_their_own():
    trial = Trial("t", ["model.path=a", "data.path=b", "x.steps=3", "adapter.rank=4"])
    swept = ["model.path=a", "data.path=b", "x.steps=3", "adapter.rank=4"]
    (row,) = table_rows(Sweep([], swept, "local", "train_loss", trials=[trial]), "trial")
    assert (row["model.path"], row["data.path"], row["x.steps"], row["rank"], row["steps"]) == ("a", "b", 3, 4, None)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("optimizer.lr=1e+30", "optimizer.lr=1e-30"),
        ("data.train_path=a/b.jsonl", "data.train_path=a-b.jsonl"),
        ("adapter.target_modules=[q_proj,k_proj]", "adapter.target_modules=['q_proj,k_proj']"),
        ("x.a=1_b2,x.b=3", "x.a=1,x.b=2_b3"),
        (f"data.train_path={'a' * 300}1", f"data.train_path={'a' * 300}2"),
        (f"data.system_prompt={'日' * 300}1", f"data.system_prompt={'日' * 300}2"),
    ],
)
def test_trial_names_are_injective(one, other):
    names = {trial_name(one), trial_name(other)}
    assert len(names) == 2 and all(len(name) < 140 and not set("=,/ ") & set(name) for name in names)
    assert all(len(name.encode()) < 230 for name in names), "a folder's name has at most 255 bytes"


def test_names_of_many_long_values_differ():
    """Four hexadecimal digits are those of another value once in 65,536 times, so of 400 values some are alike."""
    assert len({trial_name(f"data.system_prompt={'a' * 300}{n}") for n in range(400)}) == 400


def test_csv_json_and_html_hold_the_table(rank_by_alpha):
    rows = table_rows(rank_by_alpha, "validation_loss")
    assert json.loads(json_text(rows)) == rows
    read = list(csv.DictReader(io.StringIO(csv_text(rows))))
    assert [(r["trial"], r["rank"], r["validation_loss"]) for r in read[:1]] == [("rank4_alpha8", "4", "32.0")]
    assert all(f"<td>{row['trial']}</td>" in html_text(rows, None) for row in rows)


def test_heat_map_has_a_cell_a_pair_and_shows_the_values(rank_by_alpha):
    cells = heat_map(rank_by_alpha)
    assert cells.cells == {(4, 8): 32, (4, 32): 128, (16, 8): 128}
    picture = ElementTree.fromstring(svg_text(cells))
    texts = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert texts == ["validation_loss", "rank \\ alpha", "8", "32", "4", "32", "128", "16", "128", "-"]
    fills = [element.get("fill") for element in picture.iter("{http://www.w3.org/2000/svg}rect")][1:]
    best, worst, tied, missing = fills
    assert worst == tied and len({best, worst, missing}) == 3
    rank_by_alpha.swept = ["adapter.rank=4,16"]
    assert heat_map(rank_by_alpha) is None


def test_table_fits_80_columns_and_cuts_no_number_short(capsys, monkeypatch):
    row = {
        "trial": "method=dora,rank=16,alpha=32,lr=0.000195", "state": "cancelled", "attempts": 2, "steps": 10_000,
        "train_loss": 0.36451, "validation_loss": 12.3456, "tokens_per_second": 111_510.4, "seconds": 4_400.0,
    }  # fmt: skip
    monkeypatch.setenv("COLUMNS", "80")
    print_trials([row, row | {"train_loss": None, "seconds": None}])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    figures = ["cancelled", "2", "10,000", "0.3645", "12.3456", "111,510", "73", "min"]
    assert [line.split() for line in lines[lines.index(row["trial"]) + 1 :]][0] == figures


def test_copy_of_a_sweep_leaves_what_runs_to_the_original(tmp_path, capsys):
    """`sweep cancel` of a copy ended the trials of the original."""
    original, copy = tmp_path / "one", tmp_path / "two"
    original.mkdir()
    sleeper = subprocess.Popen(["sleep", "100"], start_new_session=True)
    trial = Trial("t0", ["seed=0"], "running", 1, is_waiting=False, process=process(sleeper.pid))
    write_sweep(Sweep([], ["seed=0,1"], "local", "validation_loss", count=1, trials=[trial]), original)
    shutil.copytree(original, copy)
    assert main(["sweep", "cancel", str(copy)]) == 0
    assert sleeper.poll() is None and read_sweep(copy).trials[0].process is None
    assert main(["sweep", "status", str(original)]) == 0
    assert "1 running" in capsys.readouterr().out
    moved = original.rename(tmp_path / "three")
    assert read_sweep(moved).trials[0].process == process(sleeper.pid), "what is moved keeps what it runs"
    (tmp_path / "link").symlink_to(moved)
    assert read_sweep(tmp_path / "link").trials[0].process is not None
    sleeper.kill()
    sleeper.wait()


def test_sweep_is_changed_by_one_at_a_time_where_files_cannot_be_locked(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    write_sweep(Sweep([], ["seed=0,1"], "local", "validation_loss"), tmp_path)

    def count(times: int) -> None:
        for _ in range(times):
            with changed_sweep(tmp_path) as sweep:
                sweep.count += 1

    threads = [threading.Thread(target=count, args=(10,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_sweep(tmp_path).count == 30 and not (tmp_path / ".changing").exists()
    for left_by, ahead in ((DEAD, 86400), (replace(DEAD, host="elsewhere"), -86400)):
        monkeypatch.setattr(change_lock, "SECONDS_TO_CHANGE", 600 if left_by.is_here else 0.3)
        (tmp_path / ".changing").write_text(json.dumps(asdict(left_by)))
        os.utime(tmp_path / ".changing", (time.time() + ahead,) * 2)  # its clock was another
        count(1)
    assert read_sweep(tmp_path).count == 32


def test_change_that_is_made_elsewhere_is_waited_for_whatever_the_clock_says(tmp_path, monkeypatch):
    """There are no locks, and the clock was set back by a day when the other process began."""
    monkeypatch.setattr(change_lock, "SECONDS_TO_CHANGE", 0.6)
    made = tmp_path / ".changing"
    made.write_text(json.dumps(asdict(replace(DEAD, host="elsewhere"))))
    os.utime(made, (time.time() - 86400,) * 2)

    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    begun = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - begun >= 0.6


def test_command_in_a_folder_that_is_gone_is_one_line(tmp_path):
    (tmp_path / "gone").mkdir()
    script = 'cd "$0" && rmdir "$0" && exec "$1" -m lightning_peft sweep status x'
    command = ["bash", "-c", script, str(tmp_path / "gone"), sys.executable]
    environment = os.environ | {"PYTHONPATH": str(Path(lightning_peft.__file__).parent.parent)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 2 and run.stderr == "error: the working folder is there no more; cd to one that is\n"


def test_metric_named_like_a_swept_key_leaves_its_column_alone():
    result = {"status": "finished", "metrics": {"dropout": 0.5, "method": 0.25}}
    trial = Trial("one", ["adapter.dropout=0.1", "method=dora"], "finished", result=result)
    sweep = Sweep([], ["adapter.dropout=0.1,0.2", "method=dora,lora"], "local", "dropout", trials=[trial])
    (row,) = table_rows(sweep, "dropout")
    assert (row["adapter.dropout"], row["swept method"]) == (0.1, "dora")
    assert (row["dropout"], row["method"]) == (0.5, 0.25)


@pytest.mark.parametrize(
    ("result", "is_damaged"),
    [
        ({"status": "finished", "metrics": [1.0]}, True),
        ({"status": "finished", "metrics": None, "device_hours": None, "seconds": 36.0, "validation_loss": 1.0}, False),
        ({"status": "finished", "device_hours": "1"}, True),
        ({"status": "finished", "device_hours": {}}, True),
        ({"status": "finished", "validation_loss": [1.0]}, True),
        ({"status": "finished", "validation_loss": True}, True),
        ({"status": "paused", "steps": None}, True),
        ({"status": "finished", "validation_loss": 1.0, "content": ["rows"]}, True),
    ],
)
def test_result_that_a_hand_has_changed_is_said_or_read(result, is_damaged, tmp_path, caplog, capsys):
    trials = [Trial("one", ["adapter.rank=4"]), Trial("two", ["adapter.rank=8"])]
    write_sweep(Sweep([], ["adapter.rank=4,8"], "local", "validation_loss", trials=trials), tmp_path)
    good = {"status": "finished", "validation_loss": 2.0, "steps": 3, "seconds": 1.0, "metrics": {}}
    for trial, of_it in zip(trials, (result, good), strict=True):
        (tmp_path / trial.name).mkdir()
        (tmp_path / trial.name / "result.json").write_text(json.dumps(of_it))
    assert main(["sweep", "table", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert ("not what a run writes" in printed.err + caplog.text) == is_damaged
    assert f"of {'two' if is_damaged else 'one'}" in printed.out


@pytest.mark.parametrize("name", ["../../elsewhere", "", "..", "a/b"])
def test_name_of_a_trial_that_leads_out_of_the_sweep_is_refused(tmp_path, name, capsys):
    write_sweep(Sweep([], ["seed=1"], "local", "validation_loss", count=1, trials=[Trial(name, ["seed=1"])]), tmp_path)
    assert main(["sweep", "table", str(tmp_path)]) == 2
    assert f"{name!r} is no name of a folder in the sweep's" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("+sweep.paralel=2", "sweep.paralel: no such option; did you mean "),
        ("sweep.parallel=1,2", "sweep.parallel=1,2: of the sweep itself, so it has one value"),
        ("cluster=local,slurm", "sweep.cluster=local,slurm: of the sweep itself, so it has one value"),
    ],
)
def test_word_of_the_sweep_itself_that_is_wrong_is_named(tmp_path, word, message, capsys):
    assert main(["submit", "-m", "model=tiny", "seed=0,1", f"sweep_dir={tmp_path}/s p (1)", word]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
