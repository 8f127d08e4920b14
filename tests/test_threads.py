"""Threads are as many as there is time for, and do not spin against other processes."""

import os
import subprocess
import sys

import pytest

from lightning_peft.threads import available_cores, quota_of_cores

SHOW = (
    "import os, sys\nfrom lightning_peft.threads import set_up_threads, described\nset_up_threads()\n"
    "assert 'torch' not in sys.modules\nprint(described())"
)


def described(**environment: str) -> str:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("OMP", "GOMP", "KMP"))}
    done = subprocess.run([sys.executable, "-c", SHOW], env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_quota_of_a_container_is_read(tmp_path, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert quota_of_cores(tmp_path) == cores


def test_threads_wait_as_their_neighbours_let_them_unless_told_otherwise():
    follows = len(os.sched_getaffinity(0)) > 1 and available_cores() == len(os.sched_getaffinity(0))
    assert described().endswith("=250000 and asleep beside busy neighbours" if follows else "GOMP_SPINCOUNT=0")
    assert described(OMP_NUM_THREADS="2").endswith("GOMP_SPINCOUNT=0")
    assert described(GOMP_SPINCOUNT="250000") == described()  # a parent's decision is no word of the user
    assert described(OMP_NUM_THREADS="2", GOMP_SPINCOUNT="250000").endswith("GOMP_SPINCOUNT=0")
    assert described(GOMP_SPINCOUNT="100").endswith("GOMP_SPINCOUNT=100")
    assert described(OMP_WAIT_POLICY="active").endswith("cores, OMP_WAIT_POLICY=active")
    assert described(OMP_NUM_THREADS="3").startswith("threads: 3 of ")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_threads_follow_the_affinity_mask():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n" + SHOW
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if not key.startswith(("OMP", "GOMP", "KMP"))},
    )
    assert done.stdout.startswith("threads: 1 of ")
