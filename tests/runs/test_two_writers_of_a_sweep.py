"""Two commands at one sweep's folder, and a sweep of another user: the holder is named, and nothing is lost."""

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from starts import COMMAND, started
from test_lock import holder_of
from tiny_runs import TINY

from lightning_peft.__main__ import main
from lightning_peft.sweeps import change_lock
from lightning_peft.sweeps.sweep import Sweep, Trial, changed_sweep, write_sweep

SHORT = ["trainer.max_steps=1", "data.max_rows=6", "data.max_validation_rows=2"]
STRANGER = 4711


def a_sweep(folder: Path, cluster: str = "local") -> Path:
    trials = [Trial(f"seed{n}", [f"seed={n}"], is_waiting=False) for n in range(2)]
    folder.mkdir(exist_ok=True)
    write_sweep(Sweep([*TINY, *SHORT], ["seed=0,1"], cluster, "validation_loss", count=2, trials=trials), folder)
    return folder


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """Yield a folder that another process writes, and its number."""
    holder = holder_of(tmp_path / "sweep")
    yield tmp_path / "sweep", holder.pid
    holder.send_signal(signal.SIGKILL)
    holder.communicate()


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["train", "-m", *TINY, *SHORT, "seed=0,1"], "run_dir"),
        (["train", "-m", *TINY, *SHORT, "seed=0,1", "sweep.together=2"], "run_dir"),
        (["submit", "-m", "cluster=local", *TINY, *SHORT, "seed=0,1"], "sweep_dir"),
    ],
)
def test_second_sweep_in_a_folder_is_told_who_writes_it(held, capsys, words, key):
    folder, pid = held
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main([*words, f"{key}={folder}"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {key}={folder}: process {pid} on {socket.gethostname()} since ")
    assert line.endswith("writes it: wait for it, or name another")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("more", [[], ["sweep.together=2"]])
def test_folder_that_a_variable_names_is_the_one_it_stands_for(held, capsys, monkeypatch, more):
    folder, pid = held
    monkeypatch.setenv("OF_SWEEPS", str(folder.parent))
    monkeypatch.chdir(folder.parent)
    named = f"run_dir=${{oc.env:OF_SWEEPS}}/{folder.name}"
    assert main(["train", "-m", *TINY, *SHORT, "seed=0,1", *more, named]) == 2
    assert f"run_dir={folder}: process {pid} on" in capsys.readouterr().err
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_second_retry_waits_for_the_first(held, capsys, monkeypatch):
    folder, pid = held
    a_sweep(folder)
    monkeypatch.setattr("lightning_peft.commands.sweep.SECONDS_FOR_ANOTHER_RETRY", 0.5)
    before = (folder / "sweep.json").read_bytes()
    assert main(["sweep", "retry", str(folder), "failed=true"]) == 2
    assert f"sweep_dir={folder}: process {pid} on " in capsys.readouterr().err
    assert (folder / "sweep.json").read_bytes() == before


@pytest.mark.slow
def test_of_two_sweeps_at_once_one_trains_all_of_its_trials(tmp_path):
    train_m = [*COMMAND, "train", "-m", *TINY, *SHORT]
    ways = ["adapter.rank=2,4", "adapter.rank=8,16"]
    both = [started(way, "run_dir=s", cwd=tmp_path, command=train_m) for way in ways]
    printed = [process.communicate()[0] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], printed
    won = [process.returncode for process in both].index(0)
    assert f"run_dir=s: process {both[won].pid} on" in printed[1 - won]
    trials = json.loads((tmp_path / "s" / "sweep.json").read_text())["trials"]
    ranks = ways[won].removeprefix("adapter.rank=").split(",")
    assert [(trial["name"], trial["attempts"]) for trial in trials] == [(f"rank{rank}", 1) for rank in ranks]


def test_whoever_waits_for_a_change_of_the_sweep_says_for_whom(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(change_lock, "WAIT_IS_SAID_AFTER", 0.1)
    folder, may_end = a_sweep(tmp_path / "sweep"), threading.Event()
    has_begun = threading.Event()

    def hold() -> None:
        with changed_sweep(folder):
            has_begun.set()
            may_end.wait(30)

    other = threading.Thread(target=hold)
    other.start()
    has_begun.wait()
    threading.Timer(0.5, may_end.set).start()
    with changed_sweep(folder) as sweep:
        assert sweep.count == 2
    other.join()
    said = f"{folder}: waiting for process {os.getpid()} on {socket.gethostname()}, which changes the sweep"
    assert [record.message for record in caplog.records] == [said]


@contextmanager
def as_a_stranger() -> Iterator[None]:
    """Have files opened as by a user of another number, inside the block."""
    if os.getuid() != 0:
        pytest.skip("becoming another user needs root")
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(STRANGER)
    os.seteuid(STRANGER)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


@pytest.fixture
def of_root(tmp_path: Path) -> Iterator[Path]:
    """Yield the sweep of a user, in a folder that others may look into."""
    folder = a_sweep(tmp_path / "sweep")
    opened = [path for path in tmp_path.parents if not path.stat().st_mode & 0o001]
    before = [path.stat().st_mode for path in opened]
    for path in opened:  # pytest keeps its folders for itself
        path.chmod(path.stat().st_mode | 0o011)
    tmp_path.chmod(0o755)
    folder.chmod(0o755)
    yield folder
    for path, mode in zip(opened, before, strict=True):
        path.chmod(mode)


def test_sweep_of_another_user_can_be_looked_at_and_not_changed(of_root, capsys):
    verbs = {"status": [], "table": [], "retry": ["failed=true"], "cancel": []}
    for verb in ("status", "table", "cancel"):  # modules imported on the way may be in a folder of root's own
        assert main(["sweep", verb, str(of_root)]) == 0
    before = (of_root / "sweep.json").read_bytes()
    capsys.readouterr()
    with as_a_stranger():
        for verb, words in verbs.items():
            status = main(["sweep", verb, str(of_root), *words])
            printed = capsys.readouterr()
            if verb in ("status", "table"):
                assert status == 0 and "seed0" in printed.out and printed.err == ""
            else:
                assert status == 2 and printed.err.count("\n") == 1
                assert printed.err.startswith(f"error: {of_root}/.") and "permission denied" in printed.err
    assert (of_root / "sweep.json").read_bytes() == before
    (of_root / "sweep.json").chmod(0o600)
    with as_a_stranger():
        assert main(["sweep", "status", str(of_root)]) == 2
    assert capsys.readouterr().err == f"error: {of_root}/sweep.json: permission denied\n"
