"""The bash of a slot: what it asks of the sweep and of SLURM, however a trial ends."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from lightning_peft.__main__ import main
from lightning_peft.cluster.slurm import SlurmConfig, batch_script


@dataclass
class Slot:
    """A slot with commands of its own on PATH: a sweep that gives two trials, and ranks that end as they are told."""

    root: Path
    state: str = "RUNNING"
    end_time: int | None = None
    silent: int = 0
    """Number of times that squeue fails before it answers."""
    lost: int = 0
    """Number of asks of the sweep after the first that get no answer."""

    def run(self, first: str, second: str = "exit 0") -> tuple[int, list[str]]:
        """Return the exit status, and what was asked; `first` and `second` are the ends of the two trials' ranks."""
        log, trials = self.root / "asked", [self.root / name for name in ("a trial", "b")]
        for number, (trial, does) in enumerate(zip(trials, (first, second), strict=True)):
            (trial / "checkpoints").mkdir(parents=True, exist_ok=True)
            (self.root / f"ranks-{number}").write_text(f'cd "{trial}"\n{does}\n')
        (self.root / "given").write_text("".join(f"{trial}\n" for trial in trials))
        commands = {
            "python": f'echo ask "${{@:6:1}}" >> {log}\necho "${{@:7}}" >> {self.root}/reported\n'
            f"asks=$(grep -c ask {log})\n"
            f"if [ $asks -gt 1 ] && [ $asks -le $((1 + {self.lost})) ]; then exit 1; fi\n"
            f'sed -n "$((asks > 1 ? asks - {self.lost} : 1))p" {self.root}/given',
            "srun": f"echo srun >> {log}\nexec bash {self.root}/ranks-$(($(grep -c srun {log}) - 1))",
            "squeue": f"echo >> {self.root}/looks; [ $(wc -l < {self.root}/looks) -gt {self.silent} ] || exit 1\n"
            f"echo {self.state}",
            "sleep": 'exec /usr/bin/sleep "$(($1 < 4 ? $1 : 0))"',
            "scontrol": f'if [ "$1" = requeue ]; then echo "$@" >> {log}; else echo localhost; fi',
            "scancel": f'echo scancel "$@" >> {log}',
        }
        for name, text in commands.items():
            (self.root / name).write_text(f"#!/bin/bash\n{text}\n")
            (self.root / name).chmod(0o755)
        for path in (log, self.root / "looks", self.root / "reported"):
            path.unlink(missing_ok=True)
        script = batch_script(SlurmConfig(time=60), "name", "log", "", "", "0-1", slot_of=self.root)
        environment = {
            "PATH": f"{self.root}:/usr/bin:/bin", "SLURM_JOB_ID": "72", "SLURM_JOB_NODELIST": "node1",
            "SLURM_ARRAY_JOB_ID": "71", "SLURM_ARRAY_TASK_ID": "0",
        }  # fmt: skip
        if self.end_time is not None:
            environment["SLURM_JOB_END_TIME"] = str(self.end_time)
        done = subprocess.run(["bash"], input=script, text=True, env=environment, timeout=60)
        return done.returncode, [line.strip() for line in log.read_text().splitlines() if line != "srun"]


SAYS = 'echo \'{"status": "%s"}\' > result.json; exit %d'


def test_script_is_valid_bash(tmp_path):
    script = batch_script(SlurmConfig(), "name", "log", "", "", "0-1", slot_of=tmp_path / "my sweep")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("first", "status", "asked"),
    [
        (SAYS % ("paused", 75), 0, ["ask", "ask ended=75", "ask ended=0"]),
        (SAYS % ("finished", 0), 0, ["ask", "ask ended=0", "ask ended=0"]),
        (SAYS % ("failed", 1), 1, ["ask", "ask ended=1", "ask ended=0"]),
        (SAYS % ("diverged", 3), 3, ["ask", "ask ended=3", "ask ended=0"]),
        ("exit 137", 137, ["ask", "ask ended=137", "ask ended=0"]),  # killed, out of memory
        (SAYS % ("preempted", 75), 75, ["ask", "requeue 71_0"]),
        ("exit 75", 75, ["ask", "requeue 71_0"]),  # told before the first step
        ("exit 143", 75, ["ask", "requeue 71_0"]),  # told before Python heeds a signal
        ("exit 1", 1, ["ask", "ask ended=1", "ask ended=0"]),  # raised before the trial could write how it ended
        (SAYS % ("preempted", 1), 75, ["ask", "requeue 71_0"]),  # one of its ranks was not saved
        ("touch leave; sleep 3; exit 75", 0, ["ask", "scancel --signal=USR1 71_0", "ask ended=75", "ask ended=0"]),
    ],
)
def test_slot_goes_on_with_another_trial_or_begins_anew(tmp_path, first, status, asked):
    assert Slot(tmp_path).run(first) == (status, asked)


@pytest.mark.parametrize("first", [SAYS % ("preempted", 75), "exit 143", "exit 137"])
def test_slot_that_is_cancelled_judges_and_begins_nothing(tmp_path, first):
    assert Slot(tmp_path, state="COMPLETING").run(first)[1] == ["ask"]


def test_slot_near_its_end_begins_no_further_trial(tmp_path):
    assert Slot(tmp_path, end_time=1).run("exit 0") == (75, ["ask", "ask ended=0", "requeue 71_0"])


def test_trial_for_which_srun_makes_no_step_any_more_is_not_judged(tmp_path):
    assert Slot(tmp_path, end_time=1).run("exit 1") == (75, ["ask", "requeue 71_0"])


def test_third_start_without_a_checkpoint_is_the_last_of_its_trial_and_not_of_the_slot(tmp_path):
    slot, again = Slot(tmp_path), (75, ["ask", "requeue 71_0"])
    assert [slot.run("exit 75") for _ in range(3)] == [again, again, (1, ["ask", "ask ended=1", "ask ended=0"])]
    assert slot.run("touch checkpoints/step-00000001.ckpt; exit 75") == again


@pytest.mark.parametrize(
    ("first", "status", "asked"),
    [
        (SAYS % ("finished", 0), 0, ["ask", "ask ended=0", "ask ended=0"]),
        (SAYS % ("preempted", 75), 75, ["ask", "requeue 71_0"]),
        ("exit 137", 137, ["ask", "ask ended=137", "ask ended=0"]),
    ],
)
def test_controller_that_does_not_answer_is_asked_again(tmp_path, first, status, asked):
    assert Slot(tmp_path, silent=3).run(first) == (status, asked)


def test_controller_that_never_answers_is_left(tmp_path, capfd):
    assert Slot(tmp_path, silent=99).run("exit 137")[1] == ["ask"]
    assert "error: no answer of squeue in ten minutes, so job 71_0 leaves" in capfd.readouterr().err


def test_sweep_that_does_not_answer_is_told_again_what_ended_and_how(tmp_path):
    slot = Slot(tmp_path, lost=2)
    assert slot.run("exit 137") == (137, ["ask", *3 * ["ask ended=137"], "ask ended=0"])
    assert (tmp_path / "reported").read_text().splitlines() == ["", *3 * ["trials=['a trial']"], "trials=['b']"]


@pytest.mark.parametrize("words", [["sweep.pruning=asha", "trainer.max_steps=9"], ["sweep.budget_gpu_hours=1"]])
def test_slots_are_no_containers(tmp_path, capsys, words):
    words = ["model=tiny", "seed=1,2", *words, "cluster.container='apptainer exec image.sif'"]
    assert main(["submit", "-m", "cluster=slurm", *words, f"sweep_dir={tmp_path}/s"]) == 2
    assert "each task asks the sweep for its trial" in capsys.readouterr().err and not (tmp_path / "s").exists()
