"""Jobs of Kubernetes and SkyPilot: the files written for them, the script that their machines run, and their states."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from lightning_peft.__main__ import main
from lightning_peft.cluster.job import JobSpec
from lightning_peft.cluster.kubernetes import Kubernetes, KubernetesConfig, indexes, jobs_of
from lightning_peft.cluster.skypilot import SkyPilot, SkyPilotConfig, sky_name
from lightning_peft.cluster.skypilot import jobs_of as jobs_of_queue
from lightning_peft.sweeps.sweep import CANCELLED, FINISHED, read_sweep

VERSIONS = ("1.31", "1.34", "1.37")
"""Version of Kubernetes, whose schemas the documents are held to."""
TINY = ["model=tiny", "data=cmudict", "data.max_rows=64", "data.max_validation_rows=8", "logger=none"]
TINY += ["validation.samples=0"]


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["submit", *words, "cluster.dry_run=true"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["cluster.gpus_per_node=1"],
        ["cluster.gpus_per_node=8", "cluster.nodes=2", "strategy=fsdp", "cluster.cpus=32", "cluster.memory=256Gi"],
        ["-m", "adapter.rank=2,4,8", "sweep.parallel=2", "cluster.secrets=[wandb]", "cluster.tolerations=[spot]",
         "cluster.node_selector={kind: spot}", "cluster.namespace=research"],
    ],
    ids=["run", "nodes", "sweep"],
)  # fmt: skip
def test_kubernetes_takes_what_is_written(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["model=tiny", "cluster=kubernetes", "cluster.image=me/lightning_peft:1", f"run_dir={tmp_path}/My_Run"]
    text = printed(capsys, *words, *common, f"cluster.volumes={{{tmp_path}: runs-claim}}")
    documents = list(yaml.safe_load_all(text))
    for version in VERSIONS:
        for document in documents:
            kubernetes_validate.validate(document, version, strict=True)
    job = documents[-1]["spec"]
    container = job["template"]["spec"]["containers"][0]
    subprocess.run(["bash", "-n", "-c", container["command"][-1]], check=True)
    if "-m" in words:
        assert (job["completions"], job["parallelism"]) == (3, 2)
    if "cluster.nodes=2" in words:
        assert documents[0]["kind"] == "Service" and job["parallelism"] == 2
        assert container["resources"]["limits"] == {"cpu": "32", "memory": "256Gi", "nvidia.com/gpu": "8"}


def test_skypilot_gets_what_it_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["cluster=skypilot", "cluster.accelerator=H100", "cluster.gpus_per_node=8", "cluster.nodes=2",
             "cluster.spot=true", "cluster.infra=aws", f"cluster.volumes={{{tmp_path}: \"s3://my-runs\"}}"]  # fmt: skip
    task = yaml.safe_load(printed(capsys, "model=tiny", "strategy=fsdp", f"run_dir={tmp_path}/run", *words))
    assert task["resources"] == {
        "infra": "aws", "accelerators": "H100:8", "use_spot": True,
        "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]},
    }  # fmt: skip
    assert task["num_nodes"] == 2 and task["file_mounts"][str(tmp_path)]["source"] == "s3://my-runs"
    subprocess.run(["bash", "-n", "-c", task["run"]], check=True)
    if (sky := os.environ.get("SKYPILOT_PYTHON")) is not None:
        (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
        read = f"import sky; sky.Task.from_yaml({str(tmp_path / 'task.yaml')!r})"
        subprocess.run([sky, "-c", read], check=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cluster=kubernetes"], "cluster.image: give the image"),
        (["cluster=kubernetes", "cluster.image=x"], "keeps runs in a volume; give a folder below one of"),
        (["cluster=kubernetes", "cluster.image=x", "cluster.volumes={/no/such: claim}", "run_dir=/no/such/run"],
         "/no/such is no folder of this machine"),
        (["cluster=kubernetes", "cluster.volumes={runs: claim}"], "a path starts with /"),
        (["cluster=kubernetes", "cluster.partition=gpu"], "cluster.partition"),
        (["cluster=skypilot", "cluster.accelerator=H100"], "takes a kind and a number of GPUs"),
        (["cluster=slurn"], "slurm"),
        (["-m", "adapter.rank=2,4", "cluster=kubernetes", "cluster.image=x", "cluster.nodes=2", "strategy=ddp"],
         "each trial of a sweep on Kubernetes is one pod"),
        (["-m", "optimizer.lr=interval(1e-4,1e-2)", "sweep.search=optuna", "sweep.trials=4", "cluster=kubernetes",
          "cluster.image=x", "cluster.volumes={/tmp: claim}"], "use grid or random"),
        (["cluster=skypilot", "cluster.volumes={/tmp: \"s3://x\"}", "cluster.environment={NOT_SET_HERE: null}"],
         "this machine has no such variable"),
        (["-m", "adapter.rank=2,4", "cluster=skypilot", "sweep.parallel=2", "cluster.volumes={/tmp: \"s3://x\"}"],
         "SkyPilot decides how many"),
        (["-m", "adapter.rank=2,4", "cluster=kubernetes", "sweep.pruning=asha", "trainer.max_steps=8"],
         "cluster=local"),
    ],
)  # fmt: skip
def test_what_a_cluster_cannot_do_is_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = [] if any(word.startswith("run_dir=") for word in words) else [f"run_dir={tmp_path}/run"]
    assert main(["submit", "model=tiny", *folder, *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and said in error
    assert not (tmp_path / "run").exists()


KUBECTL = """\
#!{python}
import json, re, sys
from pathlib import Path
import yaml
folder = Path(__file__).parent
words = sys.argv[1:]
with (folder / "asked").open("a") as asked:
    asked.write(" ".join(words) + "\\n")
if "create" in words:
    for document in yaml.safe_load_all(Path(words[words.index("--filename") + 1]).read_text()):
        (folder / f"{{document['kind']}}.json").write_text(json.dumps(document))
        print(f"{{document['kind'].lower()}}.batch/{{document['metadata']['name']}}")
elif "job" in words and "get" in words:
    if not (folder / "Job.json").exists():
        sys.exit("Error from server (NotFound): jobs.batch not found")
    state = json.loads((folder / "Job.json").read_text())
    print(json.dumps(state | {{"status": json.loads((folder / "status.json").read_text())}}))
elif "pods" in words:
    print((folder / "pods.json").read_text())
elif "delete" in words:
    (folder / "Job.json").unlink(missing_ok="--ignore-not-found" in words)
"""
"""Commands that answer as Kubernetes does, from files: no cluster runs where these tests do."""


def pod(index: int, phase: str, exit_code: int | None = None) -> dict[str, Any]:
    containers = [] if exit_code is None else [{"name": "train", "state": {"terminated": {"exitCode": exit_code}}}]
    return {
        "metadata": {"annotations": {"batch.kubernetes.io/job-completion-index": str(index)}},
        "status": {"phase": phase, "containerStatuses": containers},
    }


def run_index(job: dict[str, Any], index: int) -> subprocess.CompletedProcess[str]:
    """Do what the pod of an index does, here."""
    command = [word.replace("$$", "$") for word in job["spec"]["template"]["spec"]["containers"][0]["command"]]
    environment = {**os.environ, "JOB_COMPLETION_INDEX": str(index)}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


@pytest.mark.slow
def test_sweep_on_kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three trials: one ends, one is cancelled before its pod starts, and ends when it is retried, one waits."""
    cluster, sweep = tmp_path / "cluster", tmp_path / "sweep"
    cluster.mkdir()
    (cluster / "kubectl").write_text(KUBECTL.format(python=sys.executable))
    (cluster / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{cluster}:{os.environ['PATH']}")
    words = ["cluster=kubernetes", "cluster.image=me/x:1", f"cluster.volumes={{{tmp_path}: claim}}", f"run_dir={sweep}",
             f"cluster.python={sys.executable}", "cluster.namespace=research"]  # fmt: skip
    assert main(["submit", "-m", "adapter.rank=2,4,8", "trainer.max_steps=2", *TINY, *words]) == 0
    job = json.loads((cluster / "Job.json").read_text())
    (cluster / "status.json").write_text("{}")
    (cluster / "pods.json").write_text(json.dumps({"items": [pod(0, "Running")]}))
    assert main(["sweep", "status", str(sweep)]) == 0
    assert [trial.state for trial in read_sweep(sweep).trials] == ["running", "waiting", "waiting"]
    assert main(["sweep", "cancel", str(sweep), "trials=[rank4]"]) == 0
    done = [run_index(job, 0), run_index(job, 1)]
    assert [process.returncode for process in done] == [0, 0], done
    assert "cancelled: not started" in done[1].stdout
    (cluster / "status.json").write_text(json.dumps({"completedIndexes": "0,1"}))
    (cluster / "pods.json").write_text(json.dumps({"items": [pod(2, "Pending")]}))
    assert main(["sweep", "status", str(sweep)]) == 0
    assert [trial.state for trial in read_sweep(sweep).trials] == [FINISHED, CANCELLED, "waiting"]
    assert main(["sweep", "retry", str(sweep), "trials=[rank4]"]) == 0
    again = json.loads((cluster / "Job.json").read_text())
    assert again["spec"]["completions"] == 1 and run_index(again, 0).returncode == 0
    (cluster / "status.json").write_text(json.dumps({"completedIndexes": "0", "conditions": []}))
    assert main(["sweep", "cancel", str(sweep)]) == 0
    assert [trial.state for trial in read_sweep(sweep).trials][1] == FINISHED
    asked = (cluster / "asked").read_text().splitlines()
    assert any("delete job" in line and "--namespace research" in line for line in asked)


@pytest.mark.slow
def test_evicted_pod_saves_and_the_next_goes_on(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = ["cluster=kubernetes", "cluster.image=x", f"cluster.python={sys.executable}", f"run_dir={run_dir}"]
    job = written_job(tmp_path, ["trainer.max_steps=100000", *TINY, *words])
    command = job["spec"]["template"]["spec"]["containers"][0]["command"]

    def start() -> subprocess.Popen[bytes]:
        (run_dir / "job.log").unlink(missing_ok=True)
        process = subprocess.Popen(command, env={**os.environ, "JOB_COMPLETION_INDEX": "0"})
        wait_for_steps(run_dir)
        return process

    evicted = start()
    evicted.send_signal(signal.SIGTERM)
    assert evicted.wait(120) == 75
    first = json.loads((run_dir / "result.json").read_text())
    assert first["status"] == "preempted" and first["steps"] > 0
    cancelled = start()
    (run_dir / "leave").touch()
    assert cancelled.wait(120) == 0
    assert json.loads((run_dir / "result.json").read_text())["steps"] > first["steps"]


def written_job(folder: Path, words: list[str]) -> dict[str, Any]:
    """Return the Job that submit would create for a run, whose config is written."""
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    (bin_folder / "kubectl").write_text(KUBECTL.format(python=sys.executable))
    (bin_folder / "kubectl").chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
        assert main(["submit", *words, f"cluster.volumes={{{folder}: claim}}"]) == 0
    found: dict[str, Any] = json.loads((bin_folder / "Job.json").read_text())
    return found


def wait_for_steps(run_dir: Path, seconds: float = 120) -> None:
    """Wait until the log of this start tells of a step."""
    log, deadline = run_dir / "job.log", time.monotonic() + seconds
    while not (log.exists() and re.search(r"step \d+", log.read_text())):
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "no log"
        time.sleep(0.2)


@pytest.mark.multi_process
def test_two_pods_train_one_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = ["cluster=kubernetes", "cluster.image=x", f"cluster.python={sys.executable}", f"run_dir={run_dir}"]
    job = written_job(tmp_path, ["trainer.max_steps=2", "cluster.nodes=2", "strategy=ddp", *TINY, *words])
    *shell, text = job["spec"]["template"]["spec"]["containers"][0]["command"]
    name = job["metadata"]["name"]
    assert f"MASTER_ADDR={name}-0.{name}" in text and job["spec"]["template"]["spec"]["subdomain"] == name
    here = text.replace(f"{name}-0.{name}", "localhost")
    port = {"MASTER_PORT": str(20000 + os.getpid() % 10000)}
    pods = [
        subprocess.Popen([*shell, here], env={**os.environ, **port, "JOB_COMPLETION_INDEX": str(index)})
        for index in range(2)
    ]
    assert [process.wait(240) for process in pods] == [0, 0]
    assert json.loads((run_dir / "result.json").read_text())["status"] == "finished"


def test_states_of_a_job_are_told_apart() -> None:
    state = {"spec": {"completions": 5}, "status": {"completedIndexes": "0-1", "failedIndexes": "2"}}
    found = {job.id: job for job in jobs_of("research/x", state, [
        pod(2, "Failed", 1), pod(3, "Failed", 75), pod(3, "Running"), pod(4, "Failed", 75),
    ])}  # fmt: skip
    states = {job_id.removeprefix("research/x"): (job.state, job.exit_code) for job_id, job in found.items()}
    assert states == {
        "_0": ("COMPLETED", 0), "_1": ("COMPLETED", 0), "_2": ("FAILED", 1), "_3": ("RUNNING", 0), "_4": ("PENDING", 0),
        "": ("RUNNING", 0),
    }  # fmt: skip
    assert found["research/x_3"].restarts == 1
    assert indexes("0-3,7") == {0, 1, 2, 3, 7} and indexes("") == set()


def test_states_in_the_queue_are_told_apart() -> None:
    records = [
        {"job_name": "a-task-1", "status": "RUNNING"},
        {"job_name": "x-0a1b2c-task-0", "status": "RECOVERING", "recovery_count": 2},
        {"job_name": "x-0a1b2c-task-1", "status": "FAILED_NO_RESOURCE"},
        {"job_name": "other", "status": "RUNNING"},
        {"job_name": "alone-000000", "status": "SUCCEEDED"},
    ]
    found = {job.id: job for job in jobs_of_queue(["x-0a1b2c", "alone-000000", "a-task-1"], records)}
    assert {name: job.state for name, job in found.items()} == {
        "x-0a1b2c_0": "REQUEUED", "x-0a1b2c_1": "FAILED", "alone-000000": "COMPLETED", "a-task-1": "RUNNING",
    }  # fmt: skip
    assert found["x-0a1b2c_0"].restarts == 2
    assert [sky_name(job_id) for job_id in ("my_sweep-0a1b2c_3", "my_sweep-0a1b2c")] == [
        "my_sweep-0a1b2c-task-3", "my_sweep-0a1b2c",
    ]  # fmt: skip


def start_of(folder: Path, exit_code: int, index: int = 0, nodes: int = 1, setup: str = "") -> tuple[int, str]:
    """Run one start of a pod, whose ranks end so after a moment; return how it ends, and its output."""
    python = folder / "python"
    python.write_text(f"#!/bin/bash\nsleep 0.2\necho trained with $LIGHTNING_PEFT_TASK\nexit {exit_code}\n")
    python.chmod(0o755)
    config = KubernetesConfig(image="x", nodes=nodes, setup=[setup], python=str(python), namespace="research")
    document = list(yaml.safe_load_all(Kubernetes().text(config, JobSpec("x", folder, "/no such folder"))))[-1]
    done = run_index(document, index)
    return done.returncode, done.stdout


def test_what_setup_sets_does_not_end_the_script(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    folder.mkdir()
    status, said = start_of(folder, 75, setup="set -euo pipefail; echo $$ > /dev/null")
    assert status == 75, said
    status, said = start_of(folder, 0, setup="set -eu")
    assert status == 0 and re.search(r"trained with research/x-[0-9a-f]{6}_0\n", said)
    assert said.rstrip().splitlines()[-1] == (folder / "job.log").read_text().rstrip().splitlines()[-1]


def test_third_start_of_a_run_without_a_checkpoint_ends_its_job(tmp_path: Path) -> None:
    ends = [start_of(tmp_path, 75, index, nodes=2)[0] for _ in range(3) for index in (1, 0)]
    assert ends == [75, 75, 75, 75, 75, 2]


def test_every_job_has_a_name_of_its_own() -> None:
    work = JobSpec("8_Läufe!" * 20, Path("/runs/x"), "/work")
    kubernetes = [yaml.safe_load(Kubernetes().text(KubernetesConfig(image="x"), work)) for _ in range(2)]
    names = [document["metadata"]["name"] for document in kubernetes]
    assert names[0] != names[1] and all(len(name) <= 50 for name in names)
    sky = [yaml.safe_load(SkyPilot().text(SkyPilotConfig(), work))["name"] for _ in range(2)]
    assert sky[0] != sky[1]
