"""Folders and files that are not what a command takes them for, and disks that take nothing: one line, nothing lost."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from disks import fill, mounted
from tiny_runs import tiny_config

from lightning_peft.__main__ import main
from lightning_peft.checkpoint.atomic import write_text
from lightning_peft.commands.train import train
from lightning_peft.sweeps.sweep import Sweep, Trial, write_sweep
from lightning_peft.user_cache import user_cache

TINY = ["model=tiny", "data.max_rows=8", "data.max_validation_rows=2", "trainer.max_steps=1", "trainer.accelerator=cpu"]
SWEPT = ["submit", "-m", "cluster=local", *TINY, "adapter.rank=2,4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(tiny_config(folder, "trainer.max_steps=2", "validation.samples=1", "validation.every_n_steps=1"))
    return folder


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """Yield a disk with no room for a page."""
    with mounted(tmp_path / "full") as folder:
        (folder / "old.html").write_text("of before")
        fill(folder / "fill")
        yield folder


def one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error of a command, its only one; the exit status must be 2."""
    capsys.readouterr()
    assert main(words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def a_sweep(folder: Path) -> Path:
    trials = [Trial(f"seed{n}", [f"seed={n}"], is_waiting=False) for n in range(2)]
    write_sweep(Sweep([], ["seed=0,1"], "local", "validation_loss", count=2, trials=trials), folder)
    return folder


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["report", "RUN"], "new.html"),
        (["report", "RUN"], "old.html"),
        (["sweep", "table", "SWEEP"], "t.csv"),
        (["inspect", "RUN"], "i.json"),
        (["merge", "adapter_path=RUN"], "merged"),
        (["convert", "RUN", "svd_rank=2"], "converted"),
        (["train", *TINY], "run"),
        (SWEPT, "sweep"),
        (["init"], "my.yaml"),
    ],
)
def test_full_disk_is_one_line_that_names_the_file(run, full, tmp_path, capsys, words, name):
    before = sorted(full.iterdir())
    options = {"train": "run_dir=", "submit": "sweep_dir=", "init": "", "sweep": "output_path="}
    places = {"RUN": str(run), "adapter_path=RUN": f"adapter_path={run}", "SWEEP": str(a_sweep(tmp_path / "sweep"))}
    typed = [places.get(word, word) for word in words]
    line = one_line([*typed, f"{options.get(words[0], 'output=')}{full}/{name}"], capsys)
    assert str(full / name) in line and "no space left on device" in line.lower()
    assert line.lower().count("no space left") == 1 and line.count("what was there before") <= 1
    left = [path for path in full.iterdir() if path not in before and not is_empty(path)]
    assert left == [] and (full / "old.html").read_text() == "of before"


def is_empty(path: Path) -> bool:
    return path.is_dir() and not any(child.is_file() for child in path.rglob("*"))


@pytest.fixture
def read_only(run: Path, tmp_path: Path) -> Iterator[Path]:
    """Yield a run's folder on a disk that is mounted read-only."""
    with mounted(tmp_path / "read_only", "8m") as disk:
        shutil.copytree(run, disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        yield disk / "run"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["evaluate", "RUN"], "RUN/evaluation.json"),
        (["evaluate", "adapter_path=ELSEWHERE", "output=RUN/scores.json"], "RUN/scores.json"),
        (["generate", "RUN", "prompt_path=PROMPTS", "output=RUN/answers.jsonl"], "RUN/answers.jsonl"),
        (["pairs", "adapter_path=RUN", "output=RUN/pairs.jsonl"], "RUN/pairs.jsonl"),
        (["inspect", "RUN"], "RUN/inspection.json"),
        (["calibrate", "RUN"], "RUN/calibration.json"),
    ],
)
def test_file_that_cannot_be_written_is_said_before_it_is_computed(
    run, read_only, tmp_path, capsys, monkeypatch, words, name
):
    monkeypatch.setattr("lightning_peft.models.loading.load_model", lambda *_, **__: pytest.fail("weights were read"))
    (tmp_path / "prompts.txt").write_text("Hi\n")
    places = {"RUN": str(read_only), "ELSEWHERE": str(run), "PROMPTS": str(tmp_path / "prompts.txt")}
    for key, place in places.items():
        words = [word.replace(key, place) for word in words]
    said = f"{name.replace('RUN', str(read_only))}: cannot be written, as {read_only} is read-only here; give output="
    assert said in one_line(words, capsys)


def test_page_on_a_read_only_disk_is_named_by_its_own_name(read_only, capsys):
    assert f"{read_only}/report.html: cannot be saved (Read-only file system)" in one_line(
        ["report", str(read_only)], capsys
    )


def test_file_that_was_asked_for_is_whole_behind_a_link_and_a_device_stays_one(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    write_text(tmp_path / "link", "größer")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text(encoding="utf-8") == "größer"
    (tmp_path / "file").chmod(0o600)
    write_text(tmp_path / "link", "for me alone")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "through")
    assert os.read(reader, 100) == b"through" and (tmp_path / "pipe").is_fifo()
    os.close(reader)


@pytest.mark.parametrize("place", ["file", "file/below"])
@pytest.mark.parametrize(
    ("words", "key"),
    [(["train", *TINY], "run_dir"), (SWEPT, "sweep_dir"), (["train", "-m", *TINY, "adapter.rank=2,4"], "run_dir")],
)
def test_file_in_the_place_of_a_folder_is_named_by_its_key(tmp_path, capsys, words, key, place):
    (tmp_path / "file").write_text("mine")
    line = one_line([*words, f"{key}={tmp_path}/{place}"], capsys)
    assert line == f"error: {key}={tmp_path}/{place}: {tmp_path}/file is a file; name a folder"
    assert (tmp_path / "file").read_text() == "mine"


def test_run_and_sweep_have_folders_of_their_own(run, tmp_path, capsys):
    sweep = a_sweep(tmp_path / "sweep")
    before = (sweep / "sweep.json").read_bytes()
    for resume in ("never", "auto"):
        line = one_line(["train", *TINY, f"run_dir={sweep}", f"resume={resume}"], capsys)
        assert f"run_dir={sweep}: holds a sweep, whose trials are the folders in it" in line
    assert [path.name for path in sweep.iterdir() if path.name != ".lock"] == ["sweep.json"]
    assert (sweep / "sweep.json").read_bytes() == before

    copy = shutil.copytree(run, tmp_path / "run")
    held = sorted(path.name for path in copy.iterdir())
    for words, key in (
        (SWEPT, "sweep_dir"),
        (["train", "-m", *TINY, "adapter.rank=2,4"], "run_dir"),
        (["train", "-m", *TINY, "adapter.rank=2,4", "sweep.together=2"], "run_dir"),
    ):
        assert f"{key}={copy}: holds a run" in one_line([*words, f"{key}={copy}"], capsys)
        assert sorted(path.name for path in copy.iterdir()) == held


@pytest.mark.parametrize("content", [b"\xff\xfe\0", b"- a\n", b"", b"{a: [b", b"a: \0"])
def test_config_path_of_no_config_is_one_line(tmp_path, capsys, content):
    (tmp_path / "config.yaml").write_bytes(content)
    assert f"config_path={tmp_path}/config.yaml: " in one_line(["train", f"config_path={tmp_path}/config.yaml"], capsys)


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_streams_end_no_command(tmp_path, closed):
    """A file opened next would take their numbers: a table would be printed into the manifest."""
    sweep = a_sweep(tmp_path / "sweep")
    closing = " ".join(f"{number}>&-" for number in closed)
    command = f"exec {closing}; {sys.executable} -m lightning_peft sweep table {sweep} output_path={tmp_path}/table.csv"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert (tmp_path / "table.csv").read_text().startswith("trial,")
    assert json.loads((sweep / "sweep.json").read_text())["swept"] == ["seed=0,1"]


def test_cache_of_a_relative_path_is_that_of_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "odd")
    assert user_cache() == tmp_path / ".cache" / "lightning_peft"
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/odd")
    assert user_cache() == Path("/var/odd/lightning_peft")


def test_output_that_is_the_terminal_s_file_is_not_put_in_its_place(tmp_path):
    command = (
        "from pathlib import Path; from lightning_peft.checkpoint.atomic import write_text\n"
        "print('before', flush=True); write_text(Path('/dev/stdout'), 'text\\n'); print('behind', flush=True)"
    )
    with (tmp_path / "out").open("a") as file:
        subprocess.run([sys.executable, "-c", command], stdout=file, check=True)
    assert (tmp_path / "out").read_text().splitlines()[-1] == "behind"


def test_estimate_on_a_full_disk_names_the_file(capsys):
    line = one_line(["estimate", "model=tiny", "output=/dev/full"], capsys)
    assert line == "error: /dev/full: no space left on device"
