"""Each logger gets the run's scalars; Weights & Biases works with no network and no key."""

import csv
from pathlib import Path

import pytest
from disks import fill, mounted
from lightning.pytorch.loggers import CSVLogger, Logger
from tiny_runs import tiny_config

from lightning_peft.commands.train import train
from lightning_peft.tracking.loggers import TensorBoard, failing_alone
from lightning_peft.tracking.metrics_csv import MetricsCSV


def metrics(run_dir):
    return list(csv.DictReader((run_dir / "metrics.csv").read_text().splitlines()))


def test_csv_has_a_row_per_step(tmp_path):
    train(tiny_config(tmp_path / "run", "trainer.max_steps=3"))
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == ["1", "2", "3", "3"]
    assert all(float(row[key]) > 0 for row in rows[:3] for key in ("loss", "grad_norm", "tokens", "step_seconds"))


def test_tensorboard_gets_the_same_loss(tmp_path):
    train(tiny_config(tmp_path / "run", "trainer.max_steps=2", "logger=tensorboard"))
    events = events_of(tmp_path / "run")
    rows = metrics(tmp_path / "run")
    logged = [event.value for event in events.Scalars("loss")]
    assert logged == pytest.approx([float(row["loss"]) for row in rows if row["loss"]], rel=1e-6)


def events_of(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return events


def test_tensorboard_hides_what_a_resumed_run_writes_again(tmp_path, monkeypatch):
    for start, clock, steps in ((10, 1_000_000_000, (1, 2, 3)), (20, 900_000_000, (2, 3))):  # the clock is set back
        monkeypatch.setattr("time.time", lambda clock=clock: clock)
        log = TensorBoard(str(tmp_path))
        log.start_at(steps[0] - 1)
        for step in steps:
            log.log_metrics({"loss": start + step}, step)
        assert [event.step for event in events_of(tmp_path).Scalars("loss")] == [1, 2, 3], "rows are there at once"
        log.close("preempted", tmp_path)
    assert [event.value for event in events_of(tmp_path).Scalars("loss")] == [11, 22, 23]


def test_tensorboard_on_a_full_disk_costs_one_line(small_disk, caplog, capfd):
    log = TensorBoard(str(small_disk))
    log.log_metrics({"loss": 1.0}, 1)
    fill(small_disk / "filler")
    for step in range(2, 400):
        log.log_metrics({"loss": 1 / step, "grad_norm": 1.0}, step)
    log.close("finished", small_disk)
    assert caplog.messages == [
        "tensorboard: OSError ([Errno 28] No space left on device); nothing more is logged there, training goes on"
    ]
    assert capfd.readouterr().err == ""
    assert [event.step for event in events_of(small_disk).Scalars("loss")][:1] == [1]


def test_no_logger_writes_no_metrics(tmp_path):
    train(tiny_config(tmp_path / "run", "trainer.max_steps=1", "logger=none"))
    assert not (tmp_path / "run" / "metrics.csv").exists()


class Away(CSVLogger):
    """A logger of somebody's own whose server goes away after the second step."""

    def __init__(self, save_dir: str, at_end: bool = False):
        super().__init__(save_dir)
        self.at_end = at_end

    def log_metrics(self, metrics, step=None):
        if step == 3 and not self.at_end:
            raise RuntimeError("the server\nis away")
        super().log_metrics(metrics, step)

    def finalize(self, status):
        raise RuntimeError("cannot finalize")


@pytest.mark.parametrize("at_end", [False, True])
def test_logger_of_ones_own_fails_alone(tmp_path, caplog, at_end):
    own = f"+logger.mine={{_target_: test_loggers.Away, save_dir: {tmp_path}/own, at_end: {at_end}}}"
    words = ["trainer.max_steps=4", "validation.every_n_steps=2", "logger=[csv,tensorboard]", own]
    result = train(tiny_config(tmp_path / "run", *words))
    assert result["status"] == "finished"
    assert [row["step"] for row in metrics(tmp_path / "run") if row["loss"]] == ["1", "2", "3", "4"]
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    said = [record.message for record in caplog.records if "logger.mine" in record.message]
    reason = "cannot finalize" if at_end else "the server is away"
    assert said == [f"logger.mine: RuntimeError ({reason}); nothing more is logged there, training goes on"]


class Broken(Logger):
    """A logger of somebody's own of which one part, or everything, raises, as where its server is away."""

    def __init__(self, part: str = ""):
        super().__init__()
        self.part = part

    def ask(self, part: str) -> str:
        if self.part in ("", part):
            raise RuntimeError(f"no {part}")
        return "mine"

    name = property(lambda self: self.ask("name"))
    version = property(lambda self: self.ask("version"))
    save_dir = property(lambda self: self.ask("save_dir"))
    experiment = property(lambda self: self.ask("experiment"))

    def log_hyperparams(self, params, *args, **kwargs):
        self.ask("log_hyperparams")

    def log_metrics(self, metrics, step=None):
        self.ask("log_metrics")

    def log_graph(self, *args):
        self.ask("log_graph")

    def save(self):
        self.ask("save")

    def finalize(self, status):
        self.ask("finalize")


class Closed(Broken):
    """One that takes no attributes any more once it is made."""

    def __setattr__(self, name, value):
        if hasattr(self, "part"):
            raise AttributeError(f"{name} is closed")
        super().__setattr__(name, value)


class ReadsItself(Broken):
    """One whose methods read what raises."""

    def log_metrics(self, metrics, step=None):
        self.experiment.add_scalars(metrics, step)

    def log_hyperparams(self, params, *args, **kwargs):
        Path(self.save_dir).mkdir()


@pytest.mark.parametrize(
    "node",
    [
        "Broken", "Closed", "ReadsItself",
        *(f"Broken, part: {p}" for p in ("save_dir", "experiment", "log_metrics", "finalize")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("beside", ["none", "csv"])
def test_logger_that_raises_at_any_part_fails_alone(tmp_path, caplog, node, beside):
    """The first of the loggers is asked for its folder, each for its experiment, by Lightning itself."""
    words = ["trainer.max_steps=2", f"logger={beside}", f"+logger.mine={{_target_: test_loggers.{node}}}"]
    assert train(tiny_config(tmp_path / "run", *words))["status"] == "finished"
    said = [record.message for record in caplog.records if "logger.mine" in record.message]
    if "part: save_dir" in node and beside == "csv":
        assert not said, "nobody asked for its folder"
    else:
        assert len(said) == 1 and said[0].startswith("logger.mine: RuntimeError (no ")
        assert said[0].endswith("; nothing more is logged there, training goes on")


def test_logger_that_fails_alone_is_what_it_was(tmp_path):
    own = CSVLogger(str(tmp_path), name="mine", version=3)
    other = failing_alone(CSVLogger(str(tmp_path), name="mine", version=3), "logger.mine")
    assert isinstance(other, CSVLogger)
    read = ("name", "version", "save_dir", "log_dir", "root_dir", "group_separator")
    assert [getattr(other, name) for name in read] == [getattr(own, name) for name in read]
    other.log_metrics({"loss": 1.5}, 1)
    other.save()
    assert (Path(own.log_dir) / "metrics.csv").read_text().splitlines() == ["loss,step", "1.5,1"]


@pytest.fixture
def small_disk(tmp_path):
    """Give a folder on a disk of 64 KiB."""
    with mounted(tmp_path / "disk", lazy=True) as folder:
        yield folder


def test_rows_wait_while_the_disk_is_full(small_disk, caplog):
    log = MetricsCSV(str(small_disk))
    for step in range(1, 200):
        if step == 50:
            fill(small_disk / "filler")
        if step == 150:
            (small_disk / "filler").unlink()
        log.log_metrics({"loss": 1 / step, "grad_norm": 1.0} | ({"new": 2.0} if step > 140 else {}), step)
        if step == 149:
            kept = [int(row["step"]) for row in metrics(small_disk)]
            assert kept == list(range(1, kept[-1] + 1)) and kept[-1] < 149, "no row is cut"
    rows = metrics(small_disk)
    assert [int(row["step"]) for row in rows] == list(range(1, 200))
    assert [float(row["loss"]) for row in rows] == [1 / step for step in range(1, 200)]
    assert not log.failed and caplog.text.count("No space left on device") == 1
    assert "written again, with the rows that waited" in caplog.text


def test_rows_that_never_could_be_written_are_said_at_the_end(small_disk, caplog):
    fill(small_disk / "filler")
    log = MetricsCSV(str(small_disk))
    log.log_metrics({"loss": 1.0}, 1)
    log.close("finished", small_disk)
    assert "metrics.csv: OSError ([Errno 28] No space left on device)" in caplog.text
