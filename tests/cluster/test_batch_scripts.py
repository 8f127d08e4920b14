"""The batch scripts that `submit` writes, and the templates under `slurm/`, which are of the same making."""

import subprocess
from pathlib import Path

import pytest

from lightning_peft.__main__ import main
from lightning_peft.cluster.slurm import ClusterConfig, array_tasks, array_train_words, batch_script

TEMPLATES = Path(__file__).parent.parent.parent / "slurm"
GPU = {"partition": "gpu", "time": 1440, "setup": ["module load cuda", "source .venv/bin/activate"]}
RENDERED = {
    "single_node.sbatch": batch_script(
        ClusterConfig(nodes=1, gpus_per_node=4, cpus_per_task=8, **GPU),
        "finetune",
        "runs/mine-%j.log",
        "method=qlora model=llama_3_1_8b strategy=fsdp trainer.devices=4 run_dir=runs/mine resume=auto",
    ),
    "multi_node.sbatch": batch_script(
        ClusterConfig(nodes=2, gpus_per_node=8, cpus_per_task=8, **GPU),
        "finetune",
        "runs/mine-%j.log",
        "method=qlora model=llama_3_1_70b strategy=fsdp trainer.devices=8 trainer.num_nodes=2 "
        "run_dir=runs/mine resume=auto",
    ),
    "sweep_array.sbatch": batch_script(
        ClusterConfig(nodes=1, gpus_per_node=1, cpus_per_task=8, **GPU),
        "sweep",
        "sweeps/mine/%a.log",
        array_train_words(Path("sweeps/mine/run_dirs.txt")),
        array="0-7%4",
    ),
}


@pytest.mark.parametrize("name", RENDERED)
def test_template_is_what_submit_writes(name):
    assert (TEMPLATES / name).read_text() == RENDERED[name]


@pytest.mark.parametrize("script", RENDERED.values(), ids=RENDERED)
def test_script_is_valid_bash(script):
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def run_body(tmp_path: Path, exit_status: int, state: str) -> tuple[int, list[str]]:
    """The status of the script and what it asked of SLURM, with commands of its own on PATH."""
    log = tmp_path / "asked"
    commands = {
        "srun": f'echo srun "$@" >> {log}; exit {exit_status}',
        "squeue": f"echo {state}",
        "scontrol": f'if [ "$1" = requeue ]; then echo "$@" >> {log}; else echo node1; echo node2; fi',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script = batch_script(ClusterConfig(), "name", "log", "config_path=run/config.yaml")
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "71", "SLURM_JOB_NODELIST": "node[1-2]"}
    status = subprocess.run(["bash"], input=script, text=True, env=environment).returncode
    return status, log.read_text().splitlines()[1:]


@pytest.mark.parametrize(
    ("exit_status", "state", "asked"),
    [(75, "RUNNING", ["requeue 71"]), (75, "COMPLETING", []), (1, "RUNNING", []), (0, "RUNNING", [])],
)
def test_only_a_saved_run_of_a_running_job_is_requeued(tmp_path, exit_status, state, asked):
    assert run_body(tmp_path, exit_status, state) == (exit_status, asked)


def test_dry_run_prints_the_script_and_writes_nothing(tmp_path, capsys):
    words = ["model=tiny", f"run_dir={tmp_path}/run", "cluster.partition=debug", "cluster.time=60", "cluster.grace=90"]
    more = ["cluster.sbatch=[--account physics,--exclusive]", "cluster.container='apptainer exec --nv image.sif'"]
    assert main(["submit", *words, *more, "cluster.dry_run=true"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for option in ("partition=debug", "time=60", "account physics", "exclusive", "signal=USR1@90", "requeue"):
        assert f"#SBATCH --{option}" in lines
    command = f"apptainer exec --nv image.sif python -m lightning_peft train config_path={tmp_path}/run/config.yaml"
    assert f"srun --kill-on-bad-exit=1 {command}" in lines
    assert list(tmp_path.iterdir()) == []


def test_run_dir_is_a_function_of_the_config(capsys):
    def run_dir(*words: str) -> str:
        assert main(["submit", "model=tiny", "cluster.dry_run=true", *words]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if "--output" in line)

    assert run_dir() == run_dir("cluster.partition=other")
    assert run_dir() != run_dir("seed=1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.devices=3", "cluster.tasks_per_node=2"], "trainer.devices=3 cluster.tasks_per_node=2: leave"),
        (["cluster.gpus_per_node=4", "cluster.tasks_per_node=2"], "a rank takes one GPU"),
        (["cluster.nodes=0"], "cluster.nodes=0: must be at least 1"),
        (["cluster.time=1", "cluster.grace=60"], "cluster.grace=60 cluster.time=1"),
        (["resume=never"], "resume=never: a job that SLURM requeues"),
        (["cluster.partiton=a"], "did you mean cluster.partition"),
    ],
)
def test_wrong_option_is_named(tmp_path, capsys, words, message):
    assert main(["submit", "model=tiny", f"run_dir={tmp_path}/run", *words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_train_refuses_a_cluster(capsys):
    assert main(["train", "model=tiny", "cluster=slurm"]) == 2
    assert "submit takes the same words" in capsys.readouterr().err


def test_missing_slurm_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="sbatch: not found"):
        main(["submit", "model=tiny", f"run_dir={tmp_path}/run"])


def test_array_tasks_as_slurm_writes_them():
    assert array_tasks("0-3,7%2") == [0, 1, 2, 3, 7]
    assert array_tasks("5") == [5]
