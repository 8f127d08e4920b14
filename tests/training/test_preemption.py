"""A signalled run leaves with status 75 and, started again, ends as one that was never disturbed."""

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from equal_runs import assert_equal_runs
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from started import COMMAND, Started
from tiny_runs import TINY, tiny_config

from lightning_peft.checkpoint.atomic import SaveError
from lightning_peft.commands.train import train
from lightning_peft.training.preemption import PREEMPTED, REPEAT_SECONDS, SIGNALS, Preempted
from lightning_peft.training.signal_watch import SignalWatch

RUN = [
    "data.packing=true", "data.max_length=512", "adapter.dropout=0.1", "trainer.max_steps=11", "trainer.max_epochs=4",
    "trainer.accumulate_grad_batches=2", "validation.every_n_steps=4", "checkpoint.every_n_steps=3", "resume=auto",
]  # fmt: skip
"""15 micro batches an epoch, so its last window is a half one."""


def train_preempted(run_dir: Path, *overrides: str) -> None:
    with pytest.raises(Preempted) as left:
        train(tiny_config(run_dir, *RUN, *overrides))
    assert left.value.code == PREEMPTED
    assert json.loads((run_dir / "result.json").read_text())["status"] == "preempted"


def signal_at(name: str, micro_batch: int) -> list[str]:
    return [f"+callbacks.signal={{_target_: signalling.SignalAt, name: {name}, micro_batch: {micro_batch}}}"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    train(tiny_config(run_dir, *RUN))
    return run_dir


@pytest.mark.parametrize(
    ("name", "micro_batch", "step"),
    [
        ("SIGTERM", 2, 2),  # first micro batch of a window: the window is finished
        pytest.param("SIGUSR1", 7, 4, marks=pytest.mark.slow),  # a validation follows the step
        pytest.param("SIGUSR2", 5, 3, marks=pytest.mark.slow),  # a checkpoint is due anyway
        ("SIGTERM", 14, 8),  # the half window that ends the epoch, with a validation behind it
        pytest.param("SIGUSR1", 20, 11, marks=pytest.mark.slow),  # the last step
    ],
)
def test_signalled_run_resumes_bit_equal(tmp_path, undisturbed, name, micro_batch, step):
    run_dir = tmp_path / "run"
    train_preempted(run_dir, *signal_at(name, micro_batch))
    assert (run_dir / "checkpoints" / f"step-{step:08d}.ckpt").exists()
    assert not (run_dir / "adapter").exists()
    train(tiny_config(run_dir, *RUN))
    assert_equal_runs(run_dir, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_signal_in_a_validation_loses_nothing(tmp_path, undisturbed, stage):
    train_preempted(tmp_path, f"+callbacks.signal={{_target_: signalling.SignalInValidation, stage: {stage}}}")
    train(tiny_config(tmp_path, *RUN))
    assert_equal_runs(tmp_path, undisturbed)


@pytest.mark.slow
def test_checkpoints_written_in_the_background_resume_bit_equal(tmp_path, undisturbed):
    run = [*RUN, "checkpoint.asynchronous=true"]
    train_preempted(tmp_path, "checkpoint.asynchronous=true", *signal_at("SIGTERM", 14))
    train(tiny_config(tmp_path, *run))
    assert_equal_runs(tmp_path, undisturbed)


def test_checkpoint_that_the_background_cannot_write_fails_the_run(tmp_path):
    (tmp_path / "checkpoints" / "step-00000002.ckpt").mkdir(parents=True)
    words = ["trainer.max_steps=2", "checkpoint.every_n_steps=2", "checkpoint.asynchronous=true"]
    with pytest.raises(SaveError, match="step-00000002.ckpt"):
        train(tiny_config(tmp_path, *words, "resume=auto"))
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "failed"


def test_lightning_saves_nothing_and_installs_no_handler(tmp_path, monkeypatch):
    monkeypatch.setattr(_SignalConnector, "register_signal_handlers", lambda self: pytest.fail("handlers installed"))
    before = [signal.getsignal(number) for number in SIGNALS]
    train(tiny_config(tmp_path, "trainer.max_steps=1"))
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_error_after_a_signal_is_resumable(tmp_path):
    """SLURM signals wandb's service with the ranks; the logger then fails before the step ends."""
    train_preempted(
        tmp_path, *signal_at("SIGTERM", 2), "+callbacks.error={_target_: signalling.FailAt, micro_batch: 2}"
    )
    assert not list((tmp_path / "checkpoints").glob("*.ckpt"))


def test_error_without_a_signal_is_a_failure(tmp_path):
    with pytest.raises(RuntimeError, match="micro batch 2"):
        train(tiny_config(tmp_path, *RUN, "+callbacks.error={_target_: signalling.FailAt, micro_batch: 2}"))
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "failed"


def start(run_dir: Path, *overrides: str, how: type[subprocess.Popen[bytes]] = Started) -> subprocess.Popen[bytes]:
    command = [*COMMAND, "train", *TINY, *RUN, f"run_dir={run_dir}", *overrides]
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(Path(__file__).parent)])
    environment = os.environ | {"PYTHONPATH": path}
    return how(command, stderr=subprocess.PIPE, env=environment, start_new_session=True)


def test_signal_during_the_imports_is_no_crash(tmp_path):
    process = start(tmp_path, how=subprocess.Popen)
    while not handles_sigterm(process.pid):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED, messages
    assert b"leaving at once" in messages
    assert not (tmp_path / "result.json").exists()


def handles_sigterm(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


@pytest.mark.slow
def test_second_signal_leaves_at_once(tmp_path):
    process = start(tmp_path, "+callbacks.wait={_target_: signalling.SleepAt, micro_batch: 2}")
    while not (tmp_path / "asleep").exists():
        assert process.poll() is None
        time.sleep(0.01)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(REPEAT_SECONDS + 1)
    _, messages = process.communicate(timeout=10)
    assert process.returncode == PREEMPTED, messages
    assert b"leaving at once" in messages
    assert not list((tmp_path / "checkpoints").glob("*.ckpt"))


@pytest.mark.slow
def test_signal_to_the_whole_process_group_spares_the_data_workers(tmp_path, undisturbed):
    process = start(tmp_path, "data.num_workers=1")
    while not (tmp_path / "metrics.csv").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == PREEMPTED, messages
    assert b"saved after step" in messages
    train(tiny_config(tmp_path, *RUN, "data.num_workers=1"))
    assert_equal_runs(tmp_path, undisturbed)


def test_thread_that_trains_is_no_hang_while_it_computes():
    """Trials that share a process train in threads: what the main thread does says nothing."""
    watch = SignalWatch()

    def train_a_while():
        watch.begins_to_train()
        while time.thread_time() < 1:
            pass

    thread = threading.Thread(target=train_a_while)
    thread.start()
    thread.join()
    watch._patience = 0.0
    assert not watch._is_stuck(time.monotonic())
    watch.progress()
    watch._patience = 0.0
    time.sleep(1)
    assert watch._is_stuck(time.monotonic())
