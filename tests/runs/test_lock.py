"""Two processes cannot write one folder, and a dead one keeps nobody out."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_peft.runs import lock
from lightning_peft.runs.lock import LOCK, FolderGone, FolderInUse, new_folder, only_writer

HOLD = """
import sys, time, os
from pathlib import Path
from lightning_peft.runs.lock import only_writer
with only_writer(Path(sys.argv[1])):
    # The child says so where there is one: a parent can be killed before its child has run at all.
    if sys.argv[2] != "fork" or os.fork() == 0:
        print("held", flush=True)
    time.sleep(60)
"""


def holder_of(folder: Path, how: str = "alone") -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder, how], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_second_writer_is_refused_until_the_first_is_killed(tmp_path, how):
    first = holder_of(tmp_path / "run", how)
    with pytest.raises(FolderInUse, match=rf"run_dir=.*run: process {first.pid} on .* since \d{{4}}-.* writes it"):
        with only_writer(tmp_path / "run"):
            pass
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (tmp_path / "run" / LOCK).exists()
    with only_writer(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    first.stdout.close()


def test_patience_waits_for_one_that_is_leaving(tmp_path):
    first = holder_of(tmp_path)
    first.send_signal(signal.SIGSTOP)
    with pytest.raises(FolderInUse):
        with only_writer(tmp_path, patience_seconds=1):
            pass
    first.kill()
    with only_writer(tmp_path, patience_seconds=20):
        pass
    first.wait()
    first.stdout.close()


@pytest.mark.parametrize("clock", [0.0, -86400.0, 86400.0])
def test_holder_on_another_node_is_told_by_its_time_stamp(tmp_path, monkeypatch, clock):
    """This holds where the clock of that node is a day behind or ahead too."""
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "WATCH_SECONDS", 0.5)
    path = tmp_path / LOCK
    path.write_text(json.dumps({"pid": 1, "host": "another-node", "since": time.time() + clock, "job": "77"}))
    beat = (
        "import os, sys, time\nwhile True:\n"
        " os.utime(sys.argv[1], (time.time() + float(sys.argv[2]),) * 2)\n time.sleep(0.1)"
    )
    beats = subprocess.Popen([sys.executable, "-c", beat, path, str(clock)])
    begun = path.stat().st_mtime_ns
    while path.stat().st_mtime_ns == begun:
        time.sleep(0.01)
    try:
        with pytest.raises(FolderInUse, match="process 1 on another-node, SLURM job 77, since"):
            with only_writer(tmp_path):
                pass
    finally:
        beats.kill()
        beats.wait()
    with only_writer(tmp_path):
        pass


def test_holder_renews_its_time_stamp(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    with only_writer(tmp_path):
        first = (tmp_path / LOCK).stat().st_mtime_ns
        time.sleep(0.5)
        assert (tmp_path / LOCK).stat().st_mtime_ns > first


def test_folder_that_stays_empty_goes_again_with_its_parents(tmp_path):
    with pytest.raises(RuntimeError):
        with only_writer(tmp_path / "runs" / "a"):
            raise RuntimeError("a wrong config")
    assert not (tmp_path / "runs").exists()
    (tmp_path / "mine").mkdir()
    with only_writer(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").exists()


@pytest.mark.parametrize("is_made_anew", [False, True])
def test_folder_that_is_moved_is_said_and_not_taken_for_a_new_one(tmp_path, is_made_anew):
    with pytest.raises(FolderGone, match=r"run_dir=.*run: was moved or removed while this process wrote it \(.*x.txt"):
        with only_writer(tmp_path / "run"):
            (tmp_path / "run").rename(tmp_path / "moved")
            if is_made_anew:
                (tmp_path / "run").mkdir()
                (tmp_path / "run" / LOCK).write_text("another writer's")
            (tmp_path / "run" / "below" / "x.txt").write_text("")
    assert (tmp_path / "run" / LOCK).exists() == is_made_anew
    with only_writer(tmp_path / "moved"):
        pass


def test_link_to_nothing_is_named(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "scratch")
    with pytest.raises(ValueError, match=r"run_dir=.*/link/a: .*/link is a link to .*/scratch, which is not there"):
        with only_writer(tmp_path / "link" / "a"):
            pass


def test_new_folders_have_names_of_their_own(tmp_path):
    make = "import sys; from pathlib import Path; from lightning_peft.runs.lock import new_folder; "
    make += "print(new_folder(Path(sys.argv[1])).name)"
    started = [
        subprocess.Popen([sys.executable, "-c", make, tmp_path / "runs" / "now"], stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    names = sorted(process.communicate()[0].strip() for process in started)
    assert names == ["now", *(f"now-{n}" for n in range(2, 7))]
    assert new_folder(tmp_path / "runs" / "now").name == "now-7"
