"""The batch scripts that `submit` writes, and the templates under `slurm/`, which are of the same making."""

import os
import socket
import subprocess
from pathlib import Path

import hydra
import pytest
from omegaconf import DictConfig, open_dict

from lightning_peft.__main__ import main
from lightning_peft.cluster.slurm import (
    ARRAY_TRAIN_WORDS,
    SlurmConfig,
    array_run_dir,
    array_tasks,
    batch_script,
    directive,
)
from lightning_peft.schemas import CONF_DIR, config_digest, register_schemas, set_options

TEMPLATES = Path(__file__).parent.parent.parent / "slurm"
GPU = {"partition": "gpu", "time": 1440, "setup": ["module load cuda", "source .venv/bin/activate"]}
RENDERED = {
    "single_node.sbatch": batch_script(
        SlurmConfig(nodes=1, gpus_per_node=4, cpus_per_task=8, **GPU),
        "finetune",
        "runs/mine-%j.log",
        "method=qlora model=llama_3_1_8b strategy=fsdp trainer.devices=4 run_dir=runs/mine resume=auto",
        "runs/mine",
    ),
    "multi_node.sbatch": batch_script(
        SlurmConfig(nodes=2, gpus_per_node=8, cpus_per_task=8, **GPU),
        "finetune",
        "runs/mine-%j.log",
        "method=qlora model=llama_3_1_70b strategy=fsdp trainer.devices=8 trainer.num_nodes=2 "
        "run_dir=runs/mine resume=auto",
        "runs/mine",
    ),
    "sweep_array.sbatch": batch_script(
        SlurmConfig(nodes=1, gpus_per_node=1, cpus_per_task=8, **GPU),
        "sweep",
        "sweeps/mine/%a.log",
        ARRAY_TRAIN_WORDS,
        array_run_dir(Path("sweeps/mine/run_dirs.txt")),
        array="0-7%4",
    ),
}


@pytest.mark.parametrize("name", RENDERED)
def test_template_is_what_submit_writes(name):
    assert (TEMPLATES / name).read_text() == RENDERED[name]


@pytest.mark.parametrize("script", RENDERED.values(), ids=RENDERED)
def test_script_is_valid_bash(script):
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def run_body(tmp_path: Path, exit_status: int, state: str, train: str = "") -> tuple[int, list[str]]:
    """Return the script's status and requests of SLURM, with commands of its own on PATH; `train` is the ranks'."""
    log = tmp_path / "asked"
    log.unlink(missing_ok=True)
    commands = {
        "srun": f'echo srun "$@" >> {log}; {train}\nexit {exit_status}',
        "squeue": f"echo {state}",
        "scontrol": f'if [ "$1" = requeue ]; then echo "$@" >> {log}; else echo localhost; fi',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "my run" / "checkpoints").mkdir(parents=True, exist_ok=True)
    script = batch_script(SlurmConfig(), "name", "log", "config_path=run/config.yaml", f"'{tmp_path}/my run'")
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "71", "SLURM_JOB_NODELIST": "node[1-2]"}
    status = subprocess.run(["bash"], input=script, text=True, env=environment).returncode
    return status, log.read_text().splitlines()[1:]


@pytest.mark.parametrize(
    ("exit_status", "state", "asked"),
    [(75, "RUNNING", ["requeue 71"]), (75, "COMPLETING", []), (1, "RUNNING", []), (0, "RUNNING", [])],
)
def test_only_a_saved_run_of_a_running_job_is_requeued(tmp_path, exit_status, state, asked):
    assert run_body(tmp_path, exit_status, state) == (exit_status, asked)


def test_third_start_without_a_checkpoint_is_the_last(tmp_path):
    again = (75, ["requeue 71"])
    assert [run_body(tmp_path, 75, "RUNNING") for _ in range(3)] == [again, again, (1, [])]
    assert run_body(tmp_path, 75, "RUNNING") == again, "a job that is submitted again counts anew"
    assert run_body(tmp_path, 75, "RUNNING") == again
    assert run_body(tmp_path, 75, "RUNNING", f"touch '{tmp_path}/my run/checkpoints/step-00000001.ckpt'") == again
    assert [run_body(tmp_path, 75, "RUNNING") for _ in range(3)] == [again, again, (1, [])]


def test_ranks_meet_at_a_free_port(tmp_path):
    with socket.socket() as taken:
        taken.bind(("localhost", 15071))
        taken.listen()
        run_body(tmp_path, 0, "RUNNING", f"echo $MASTER_PORT > {tmp_path}/port")
    assert (tmp_path / "port").read_text() == "15072\n"


def test_option_of_a_directive_is_quoted_where_it_must_be():
    assert directive("output", "/runs/a%%b-%j.log") == "--output=/runs/a%%b-%j.log"
    assert directive("chdir", '/my "runs" #1') == '--chdir="/my \\"runs\\" #1"'


@pytest.mark.parametrize("dry", ["cluster.dry_run=true", "dry_run=true"])
def test_dry_run_prints_the_script_and_writes_nothing(dry, tmp_path, capsys):
    words = ["model=tiny", f"run_dir={tmp_path}/run", "cluster.partition=debug", "cluster.time=60", "cluster.grace=90"]
    more = ["cluster.sbatch=[--account physics,--exclusive]", "cluster.container='apptainer exec --nv image.sif'"]
    assert main(["submit", *words, *more, dry]) == 0
    lines = capsys.readouterr().out.splitlines()
    for option in ("partition=debug", "time=60", "account physics", "exclusive", "signal=USR1@90", "requeue"):
        assert f"#SBATCH --{option}" in lines
    command = f"apptainer exec --nv image.sif python -m lightning_peft train config_path={tmp_path}/run/config.yaml"
    assert f"srun --export=ALL --kill-on-bad-exit=1 {command}" in lines
    assert f"#SBATCH --chdir={os.getcwd()}" in lines
    assert list(tmp_path.iterdir()) == []


def test_run_dir_is_a_function_of_the_config(capsys):
    def run_dir(*words: str) -> str:
        assert main(["submit", "model=tiny", "cluster.dry_run=true", *words]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if "--output" in line)

    assert run_dir() == run_dir("cluster.partition=other")
    assert run_dir() != run_dir("seed=1")


def test_run_dir_does_not_follow_from_options_that_have_their_default():
    config = compose(["model=tiny", "method=dora", "data.max_rows=9", "trainer.max_steps=3"])
    digest = config_digest(_root_=config)
    set_here = {"data.max_rows": 9, "trainer.max_steps": 3, "optimizer.weight_decay": config.optimizer.weight_decay}
    assert {key: value for key, value in set_options(config).items() if key in set_here}.items() <= set_here.items()
    assert "data.shuffle_window" not in set_options(config) and "trainer.precision" not in set_options(config)
    with open_dict(config):
        del config.data.shuffle_window  # a version without this option has this
    assert config_digest(_root_=config) == digest
    others = (["method=lora"], ["trainer.max_steps=4"], ["seed=1"], ["data.max_rows=8"])
    words = ["model=tiny", "method=dora", "data.max_rows=9", "trainer.max_steps=3"]
    assert len({digest, *(config_digest(_root_=compose([*words, *other])) for other in others)}) == 5


def compose(words: list[str]) -> DictConfig:
    register_schemas()
    with hydra.initialize_config_dir(str(CONF_DIR.resolve()), version_base="1.3"):
        return hydra.compose("submit", words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.devices=3", "cluster.tasks_per_node=2"], "trainer.devices=3 cluster.tasks_per_node=2: leave"),
        (["cluster.gpus_per_node=4", "cluster.tasks_per_node=2"], "a rank takes one GPU"),
        (["cluster.nodes=0"], "cluster.nodes=0: must be at least 1"),
        (["cluster.time=1", "cluster.grace=60"], "cluster.grace=60 cluster.time=1"),
        (["resume=never"], "resume=never: a job that the cluster starts again"),
        (["cluster.partiton=a"], "did you mean cluster.partition"),
        (["cluster.time=2:00:00"], "cluster.time=2:00:00: must be a whole number; write 120\n"),
        (["cluster.time=90:00"], "; write 90\n"),
        (["cluster.time=1-12"], "; write 2160\n"),
        (["cluster.time=1-00:30:00"], "; write 1470\n"),
        (["cluster.time=1d2h"], "; write 1560\n"),
        (["cluster.time=30m"], "; write 30\n"),
        (["cluster.time=90s"], "cluster.time=90s: must be a whole number\n"),
        (["cluster.time=infinite"], "cluster.time=infinite: must be a whole number\n"),
        (["cluster.grace=2m"], "cluster.grace=2m: must be a whole number; write 120\n"),
        (["cluster.memory=16G"], "cluster.memory: no such option; submit takes it as cluster.sbatch=['--mem=VALUE']"),
    ],
)
def test_wrong_option_is_named(tmp_path, capsys, words, message):
    assert main(["submit", "model=tiny", f"run_dir={tmp_path}/run", *words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_train_refuses_a_cluster(capsys):
    assert main(["train", "model=tiny", "cluster=slurm"]) == 2
    assert "submit takes the same words" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["submit", "run_dir={}/a/run"], ["submit", "-m", "adapter.rank=2,4", "sweep_dir={}/a/my sweep"]]
)
def test_missing_slurm_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, words):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([words[0], *(word.format(tmp_path) for word in words[1:]), "model=tiny"]) == 2
    assert "error: sbatch: not found" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_array_tasks_as_slurm_writes_them():
    assert array_tasks("0-3,7%2") == [0, 1, 2, 3, 7]
    assert array_tasks("0-6:2,9") == [0, 2, 4, 6, 9]
    assert array_tasks("5") == [5]
