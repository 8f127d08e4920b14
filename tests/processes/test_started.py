"""A forked start finds what a real one finds, and ends as it ends."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from started import COMMAND, Started, run, run_on_ranks

started_for_real = partial(subprocess.run, capture_output=True, text=True)
PROGRAM = Path(__file__).with_name("what_it_sees.py")


@pytest.mark.parametrize("how", ["0", "3", "raise", "_exit", "kill"])
@pytest.mark.parametrize("new_session", [False, True])
def test_forked_process_sees_and_ends_as_a_started_one(tmp_path, how, new_session):
    (tmp_path / "input.txt").write_text("words\n")
    options = {
        "cwd": tmp_path, "env": os.environ | {"PYTHONPATH": f"{tmp_path}/a:{tmp_path}/b", "RANK": "0"},
        "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": new_session, "text": True,
    }  # fmt: skip
    ended = []
    for start in (subprocess.Popen, Started):
        with (tmp_path / "input.txt").open() as file:
            process = start([sys.executable, PROGRAM, how], stdin=file, **options)
        out, error = process.communicate(timeout=60)
        seen, *rest = out.splitlines() or ["{}"]
        ended.append((process.returncode, json.loads(seen), rest, error.splitlines()[-1:]))
    real, forked = ended
    assert {key: (value, real[1][key]) for key, value in forked[1].items() if value != real[1][key]} == {}
    assert forked == real
    assert (how in ("_exit", "kill")) == ("the end" not in real[2])


def test_signal_and_poll_reach_it(tmp_path):
    with Started([sys.executable, PROGRAM, "sleep"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        assert process.poll() is None and os.path.exists(f"/proc/{process.pid}")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(timeout=10) == process.poll() == -signal.SIGTERM
        finally:
            process.kill()  # a process that sleeps on would be waited for


def test_command_is_the_real_one(tmp_path):
    words = ["train", "adapter.rang=8"]
    forked = run([*COMMAND, *words], cwd=tmp_path)
    assert forked.returncode == 2 and forked.stderr.startswith("error: adapter.rang: no such option")
    assert run([*COMMAND, "--version"]).stdout.startswith("lightning-peft ")


def test_code_is_run_in_its_folder(tmp_path):
    (tmp_path / "beside.py").write_text("number = 7")
    code = "import sys, beside; print(sys.argv, repr(sys.path[0]), beside.number, __name__)"
    ends = [start([sys.executable, "-c", code, "word"], cwd=tmp_path) for start in (run, started_for_real)]
    assert ends[0].stdout == ends[1].stdout == "['-c', 'word'] '' 7 __main__\n"


def test_files_passed_on_have_their_numbers(tmp_path):
    read, write = os.pipe()
    code = f"import os; os.write({write}, b'words')"
    with Started([sys.executable, "-c", code], pass_fds=[write], stdin=subprocess.DEVNULL) as process:
        os.close(write)
        assert process.wait(timeout=60) == 0 and os.read(read, 100) == b"words"
        assert os.read(read, 100) == b"", "nobody else has the end that was passed on"
    os.close(read)


def test_ranks_are_processes_that_meet(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "numbers = torch.tensor([2.0 ** dist.get_rank(), 1.0])\n"
        "dist.all_reduce(numbers)\n"
        "sys.stdout.write(f'{os.getpid()} {numbers.tolist()}\\n')\n"  # it is in one piece: all write to one pipe
        "if sys.argv[1] == 'fail' and dist.get_rank() == 1: sys.exit('one has failed')\n"
        "if sys.argv[1] == 'fail': dist.barrier()\n"
    )
    lines = [line.partition(" ") for line in run_on_ranks(3, program, "end")[0].splitlines()]
    assert [numbers for _, _, numbers in lines] == ["[7.0, 3.0]"] * 3 and len({pid for pid, _, _ in lines}) == 3
    with pytest.raises(AssertionError, match="one has failed"):
        run_on_ranks(2, program, "fail")
