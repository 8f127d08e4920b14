"""MLflow with a server of its own, Trackio and Comet: what a run logs, read back; and training that goes on without.

`make test-trackers` brings their packages.
"""

import csv
import json
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from test_wandb_run import Fail  # noqa: F401  # named by its path in an option
from tiny_runs import tiny_config

from lightning_peft.commands.train import train
from lightning_peft.tracking.service_record import service_record

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

WORDS = ["trainer.max_steps=5", "checkpoint.every_n_steps=2", "resume=auto", "data.max_rows=6"]
FAIL = "+callbacks.fail={_target_: test_wandb_run.Fail, step: 3}"


def csv_rows(run_dir: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run_dir / "metrics.csv").read_text().splitlines()))


def points(run_dir: Path, column: str) -> list[tuple[int, float]]:
    return [(int(row["step"]), float(row[column])) for row in csv_rows(run_dir) if row[column]]


def trial_folder(tmp_path: Path) -> Path:
    """Make a run folder inside a sweep's."""
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "sweep.json").write_text("{}")
    return tmp_path / "ranks" / "rank4"


def train_with_a_failure(run_dir: Path, *words: str) -> None:
    """Train two starts: the first fails behind its checkpoint."""
    with pytest.raises(RuntimeError, match="stopped"):
        train(tiny_config(run_dir, *WORDS, *words, FAIL))
    train(tiny_config(run_dir, *WORDS, *words))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[str]:
    """Run a real server on SQLite, ended with the block."""
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    with (folder / "server.txt").open("a") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(600):
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
                if answer.status == 200:
                    break
            time.sleep(0.2)
        else:
            pytest.fail((folder / "server.txt").read_text()[-2000:])
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("mlflow", reason="make test-trackers brings mlflow")
    with mlflow_server(tmp_path_factory.mktemp("mlflow"), free_port()) as uri:
        yield uri


def runs_of(uri: str, experiment: str) -> tuple[Any, list[Any]]:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    return client, list(client.search_runs([found.experiment_id])) if found else []


def test_mlflow_has_one_run_over_all_starts(server, tmp_path):
    run_dir = trial_folder(tmp_path)
    words = ["logger=mlflow", f"logger.mlflow.tracking_uri={server}", "logger.mlflow.experiment=starts"]
    train_with_a_failure(run_dir, *words, "validation.every_n_steps=2")
    client, (run,) = runs_of(server, "starts")
    assert run.info.run_id == service_record(run_dir, "mlflow")["id"] and run.info.run_name == "rank4"
    assert (run.data.tags["group"], run.data.tags["status"], run.info.status) == ("ranks", "finished", "FINISHED")
    assert run.data.params["adapter.rank"] == "16" and float(run.data.params["optimizer.lr"]) == 0.01
    for column, chart in (("loss", "train/loss"), ("validation_loss", "validation/loss")):
        logged = {(point.step, point.value) for point in client.get_metric_history(run.info.run_id, chart)}
        assert logged == set(points(run_dir, column))
    kept = {file.path for file in client.list_artifacts(run.info.run_id, "adapter")}
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/lineage.json"} <= kept
    assert [file.path for file in client.list_artifacts(run.info.run_id, "samples")]


def test_mlflow_server_that_is_not_there_costs_one_line(tmp_path, caplog):
    pytest.importorskip("mlflow", reason="make test-trackers brings mlflow")
    uri = f"logger.mlflow.tracking_uri=http://127.0.0.1:{free_port()}"
    result = train(tiny_config(tmp_path / "run", "trainer.max_steps=3", "logger=[mlflow,tensorboard]", uri))
    assert result["status"] == "finished" and len(csv_rows(tmp_path / "run")) == 4
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    lines = [r.message for r in caplog.records if r.levelname == "WARNING" and "mlflow" in r.message]
    assert len(lines) == 1 and "nothing more is logged there, training goes on" in lines[0]


def test_rows_that_an_mlflow_server_missed_are_logged_by_the_next_start(tmp_path):
    pytest.importorskip("mlflow", reason="make test-trackers brings mlflow")
    from lightning_peft.tracking.mlflow_run import MLflowRun

    port, run_dir = free_port(), tmp_path / "run"
    run_dir.mkdir()
    uri = f"http://127.0.0.1:{port}"
    first = MLflowRun(str(run_dir), uri, "missed")
    with mlflow_server(tmp_path, port):
        first.start_at(0)
        first.log_metrics({"loss": 4.0}, step=1)
        first.save()
    (run_dir / "metrics.csv").write_text("step,loss,validation_loss\n1,4.0,\n2,3.0,\n2,,3.5\n3,2.0,\n")
    first.log_metrics({"loss": 3.0}, step=2)
    first.save()
    assert first.failed
    with mlflow_server(tmp_path, port):
        second = MLflowRun(str(run_dir), uri, "missed")
        second.start_at(3)
        second.close("preempted", run_dir / "adapter")
        client, (run,) = runs_of(uri, "missed")
        history = client.get_metric_history(run.info.run_id, "train/loss")
        assert {(point.step, point.value) for point in history} == {(1, 4.0), (2, 3.0), (3, 2.0)}
        assert [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, "validation/loss")] == [(2, 3.5)]
        assert run.info.status == "KILLED"


def test_trackio_has_one_run_over_all_starts(tmp_path, monkeypatch):
    pytest.importorskip("trackio", reason="make test-trackers brings trackio")
    import trackio

    run_dir = trial_folder(tmp_path)
    train_with_a_failure(run_dir, "logger=trackio", f"logger.trackio.project=starts-{tmp_path.name[-8:]}")
    project = f"starts-{tmp_path.name[-8:]}"
    (name,) = trackio.SQLiteStorage.get_runs(project)
    assert name == f"rank4-{service_record(run_dir, 'trackio')['id'][:6]}"
    logged = trackio.SQLiteStorage.get_logs(project, name)
    found = {(row["step"], row["train/loss"]) for row in logged if "train/loss" in row}
    assert found == set(points(run_dir, "loss"))
    assert trackio.SQLiteStorage.get_run_config(project, name)["adapter.rank"] == 16
    assert trackio.SQLiteStorage.get_artifacts(project)


def test_comet_without_a_key_leaves_archives_of_one_experiment(tmp_path, monkeypatch):
    pytest.importorskip("comet_ml", reason="make test-trackers brings comet-ml")
    monkeypatch.delenv("COMET_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    run_dir = trial_folder(tmp_path)
    train_with_a_failure(run_dir, "logger=comet")
    archives = sorted((run_dir / "comet").glob("*.zip"), key=lambda path: path.stat().st_mtime)
    messages: list[dict[str, Any]] = []
    keys = set()
    for path in archives:
        with zipfile.ZipFile(path) as archive:
            keys.add(json.loads(archive.read("experiment.json"))["offline_id"])
            messages += [json.loads(line) for line in archive.read("messages.json").decode().splitlines()]
    assert keys == {service_record(run_dir, "comet")["id"] * 3} and len(archives) == 2
    metrics = [m["payload"]["metric"] for m in messages if m["type"] == "metric_msg"]
    losses = [(m["step"], float(m["metricValue"])) for m in metrics if m["metricName"] == "train/loss"]
    assert sorted(losses) == points(run_dir, "loss")
    kept = [m["payload"]["additional_params"]["fileName"] for m in messages if m.get("type") == "file_upload"]
    assert any(name.endswith("adapter_model.safetensors") for name in kept)


@pytest.mark.parametrize("name", ["mlflow", "trackio", "comet"])
def test_service_that_is_not_installed_is_named_before_a_row_is_read(tmp_path, name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    monkeypatch.setattr("lightning_peft.commands.train.read_data", lambda *_: pytest.fail("rows were read"))
    with pytest.raises(ValueError, match=rf"not installed; pip install 'lightning-peft\[{name}\]'"):
        train(tiny_config(tmp_path / "run", "trainer.max_steps=1", f"logger={name}"))
