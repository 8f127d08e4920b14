"""Several runs on one base in one process: each is what it is alone, whatever happens to the others."""

import json
import re
import signal
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from equal_runs import compared_rows, rows
from safetensors.torch import load_file
from tiny_runs import tiny_config
from torch import nn

from lightning_peft.adapters import segments
from lightning_peft.cluster.process import LEAVE
from lightning_peft.commands.together import grouped, status_of_all, train_together
from lightning_peft.commands.train import train
from lightning_peft.config import TrainConfig
from lightning_peft.sweeps.sweep import Sweep, Trial, write_sweep
from lightning_peft.training.preemption import Preempted
from lightning_peft.training.shared_passes import HandedLoss, SharedPasses, in_one_block
from lightning_peft.training.together import Member, MemberSignals, RunGroup

COMMON = ["trainer.max_steps=3", "validation.every_n_steps=2"]
TRIALS: dict[str, list[str]] = {
    "plain": ["adapter.rank=4", "adapter.alpha=8"],
    "dropped": ["method=rslora", "adapter.rank=8", "adapter.dropout=0.3", "optimizer.lr=0.003", "seed=3"],
    "windows": ["data.micro_batch_size=2", "trainer.accumulate_grad_batches=3", "trainer.gradient_clip_val=0.1"],
    "noisy": ["adapter.rank=4", "adapter.dropout=0.2", "objective.noise_alpha=5", "data.packing=false"],
    "adalora": ["method=adalora", "adapter.rank=6", "adapter.target_rank=3", "adapter.target_modules=[q_proj,v_proj]"],
}
NUMBERS = ("loss", "grad_norm", "lr", "tokens", "supervised_tokens", "validation_loss")


@pytest.fixture(autouse=True)
def all_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rows as long as these share a pass, as shorter ones do."""
    monkeypatch.setitem(segments.PASS_TOKENS, "cpu", 8192)


def configs(folder: Path, trials: Mapping[str, Sequence[str]], *words: str) -> dict[str, TrainConfig]:
    return {name: tiny_config(folder / name, *COMMON, *words, *own) for name, own in trials.items()}


def together(folder: Path, trials: Mapping[str, Sequence[str]], *words: str) -> int:
    made = configs(folder, trials, *words)
    assert grouped(made, len(made)) == [list(made)]
    return train_together(list(made.values()), folder / "list.txt")


def result(run_dir: Path) -> dict[str, object]:
    return json.loads((run_dir / "result.json").read_text())


def assert_as_alone(run_dir: Path, alone: Path, limit: float = 1e-6) -> None:
    """Assert that runs are equal but for the order in which fp32 sums of more rows are taken.

    AdamW divides by a gradient's size, so that an element whose gradient is nothing but rounding moves by its sign:
    weights are compared as a whole.
    """
    ours, expected = rows(run_dir), rows(alone)
    assert [row["step"] for row in ours] == [row["step"] for row in expected]
    for row, other in zip(ours, expected, strict=True):
        for key in NUMBERS:
            assert bool(row[key]) == bool(other[key])
            if row[key]:
                assert float(row[key]) == pytest.approx(float(other[key]), abs=limit, rel=limit), (row["step"], key)
    folders = [folder / "adapter" / "adapter_model.safetensors" for folder in (run_dir, alone)]
    found, wanted = map(load_file, folders)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name] - tensor).norm() <= 1e-3 * tensor.norm(), name
    states = [
        torch.load(sorted((folder / "checkpoints").glob("*.ckpt"))[-1], weights_only=True)
        for folder in (run_dir, alone)
        if list((folder / "checkpoints").glob("*.ckpt"))
    ]
    assert len(states) in (0, 2) and all(state.keys() == states[0].keys() for state in states)


@pytest.mark.parametrize(
    ("base", "smoothing", "names"), [("none", 0, list(TRIALS)), ("nf4", 0.1, ["plain", "dropped"])]
)
def test_each_run_is_what_it_is_alone(tmp_path: Path, base: str, smoothing: float, names: list[str]) -> None:
    words = [f"quantization={base}", f"objective.label_smoothing={smoothing}", "checkpoint.every_n_steps=2"]
    trials = {name: TRIALS[name] for name in names}
    assert together(tmp_path / "together", trials, *words) == 0
    for name, config in configs(tmp_path / "alone", trials, *words).items():
        train(config)
        assert_as_alone(tmp_path / "together" / name, tmp_path / "alone" / name)
        found, expected = result(tmp_path / "together" / name), result(tmp_path / "alone" / name)
        for key in ("status", "steps", "end", "data", "trainable_parameters", "total_parameters"):
            assert found[key] == expected[key]


@pytest.mark.parametrize("most", [1, 1024], ids=["a pass each", "some passes of two"])
def test_runs_that_take_turns_are_what_they_are_alone(
    tmp_path: Path, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As runs of long rows do: those that went first have stepped when the others pass, and one ends in between."""
    monkeypatch.setitem(segments.PASS_TOKENS, "cpu", most)
    passes: list[int] = []
    take = SharedPasses.take
    monkeypatch.setattr(SharedPasses, "take", lambda own, members: passes.append(len(members)) or take(own, members))
    trials = {name: list(TRIALS[name]) for name in ("plain", "dropped", "windows", "noisy")}
    trials["dropped"].append("trainer.max_steps=2")
    assert together(tmp_path / "together", trials, "checkpoint.every_n_steps=2") == 0
    assert (set(passes) == {1}) if most == 1 else {1, 2} <= set(passes)
    for name, config in configs(tmp_path / "alone", trials, "checkpoint.every_n_steps=2").items():
        train(config)
        assert_as_alone(tmp_path / "together" / name, tmp_path / "alone" / name)


def test_first_step_in_bf16_is_that_of_a_run_alone(tmp_path: Path) -> None:
    """A layer of the tiny model sums so few products that they are not cut by the number of rows."""
    words = ["trainer.precision=bf16-true", "trainer.max_steps=1", "validation.every_n_steps=null"]
    trials = {name: TRIALS[name] for name in ("plain", "dropped")}
    assert together(tmp_path / "together", trials, *words) == 0
    for name, config in configs(tmp_path / "alone", trials, *words).items():
        train(config)
        found, expected = (rows(tmp_path / kind / name)[0] for kind in ("together", "alone"))
        assert found["loss"] == expected["loss"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_runs_that_fill_a_pass_each_are_those_alone_to_the_bit(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(segments.PASS_TOKENS, "cpu", 512)
    words = [f"trainer.precision={precision}", "checkpoint.every_n_steps=2"]
    trials = {name: TRIALS[name] for name in ("plain", "dropped", "windows")}
    assert together(tmp_path / "together", trials, *words) == 0
    for name, config in configs(tmp_path / "alone", trials, *words).items():
        train(config)
        assert compared_rows(tmp_path / "together" / name) == compared_rows(tmp_path / "alone" / name)
        found, expected = (
            (tmp_path / way / name / "adapter" / "adapter_model.safetensors").read_bytes()
            for way in ("together", "alone")
        )
        assert found == expected


def test_run_that_diverges_or_is_wrong_leaves_the_others_alone(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    trials = {
        "good": TRIALS["dropped"],
        "wild": ["optimizer.lr=1e30", "trainer.gradient_clip_val=null", "trainer.log_every_n_steps=3"],
        "wrong": ["data.max_length=64"],
    }
    assert together(tmp_path / "together", trials) == 3
    assert "error: wrong: text_to_sql train row" in capfd.readouterr().err
    assert not (tmp_path / "together" / "wrong" / "result.json").exists()
    assert result(tmp_path / "together" / "wild")["status"] == "diverged"
    train(configs(tmp_path / "alone", trials)["good"])
    assert_as_alone(tmp_path / "together" / "good", tmp_path / "alone" / "good")


def test_run_that_left_goes_on_alone_and_together(tmp_path: Path) -> None:
    """One pauses by itself; later it goes on beside a new run, and ends as one that never paused."""
    words = [*COMMON, "checkpoint.every_n_steps=2"]
    early = tiny_config(tmp_path / "plain", *words, *TRIALS["plain"], "pause_at=1")
    other = tiny_config(tmp_path / "windows", *words, *TRIALS["windows"])
    assert train_together([early, other], tmp_path / "list.txt") == 75
    assert result(tmp_path / "plain")["status"] == "paused" and result(tmp_path / "plain")["steps"] == 1
    assert result(tmp_path / "windows")["status"] == "finished"
    again = [
        tiny_config(tmp_path / name, *words, *TRIALS[name], "resume=auto") for name in ("plain", "windows", "dropped")
    ]
    assert train_together(again, tmp_path / "list.txt") == 0
    alone = tiny_config(tmp_path / "alone", *words, *TRIALS["plain"])
    train(alone)
    assert_as_alone(tmp_path / "plain", tmp_path / "alone")


def test_one_run_is_asked_to_leave_while_the_base_loads(tmp_path: Path) -> None:
    trials = {name: TRIALS[name] for name in ("plain", "dropped")}
    made = configs(tmp_path, trials, "validation.every_n_steps=null")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / LEAVE).touch()
    assert train_together(list(made.values()), tmp_path / "list.txt") == 75
    assert (result(tmp_path / "plain")["status"], result(tmp_path / "plain")["steps"]) == ("preempted", 1)
    assert result(tmp_path / "dropped")["status"] == "finished"
    assert not (tmp_path / "plain" / LEAVE).exists()
    assert len(list((tmp_path / "plain" / "checkpoints").glob("*.ckpt"))) == 1


def test_gradients_of_a_member_are_one_block_of_memory() -> None:
    parameters = [nn.Parameter(torch.ones(count, 8)) for count in (2, 3, 4)]
    own = [torch.full((2, 8), 1.0), None, torch.full((4, 8), 2.0)]
    (HandedLoss.apply(torch.tensor(0.5), in_one_block(own), *parameters) * 3).backward()
    first, none, last = (parameter.grad for parameter in parameters)
    assert none is None and bool((first == 3).all()) and bool((last == 6).all())
    assert first.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()


def test_member_that_has_ended_is_freed_while_the_others_go_on(tmp_path: Path) -> None:
    held: list[weakref.ref[nn.Module]] = []

    def fail(member: Member) -> None:
        model = nn.Linear(2, 2)
        held.append(weakref.ref(model))
        try:
            model(torch.ones(3))
        except RuntimeError as error:
            raise ValueError("wrong") from error

    def look(member: Member) -> bool:
        return held[0]() is None

    failed, looked = RunGroup(["a", "b"]).run([fail, look])
    assert isinstance(failed.error, ValueError) and looked.value is True


def test_signals_of_a_member_are_those_of_its_process(tmp_path: Path) -> None:
    group = RunGroup(["a"])
    signals = MemberSignals(group, None, tmp_path)
    before = signals.received
    group.signals._remember(signal.SIGUSR1, None)
    assert (before, signals.received, signals.reason) == (None, signal.SIGUSR1, Preempted)


def test_exit_status_of_a_group_has_it_gone_on_with_where_one_is_to(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    assert status_of_all(folders, [0, 1, 3]) == 3
    assert status_of_all(folders, [0, 3, 75]) == 75
    trials = [Trial(folder.name, [], is_cancelled=folder.name == "c") for folder in folders]
    write_sweep(Sweep([], [], "slurm", "validation_loss", trials=trials), tmp_path)
    assert status_of_all(folders, [0, 0, 75]) == 0
    assert status_of_all(folders, [1, 75, 75]) == 75


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["method=dora"], "method=dora: dora is no low-rank product beside its base"),
        (["method=pissa"], r"method=pissa: starts by rewriting the base \(adapter.init=pissa\)"),
        (["method=full"], "method=full: trains the base itself"),
        (["method=vera"], "method=vera: keeps state beside its layers"),
        (["adapter.target_modules=[q_proj,lm_head]"], "adapter.target_modules: lm_head is no linear layer of a block"),
        (["adapter.trainable_modules=[norm]"], "trains .'norm'. of the base"),
        (["model.attention=eager"], "the samples of several trials in one row would see each other"),
        (["+trainer.detect_anomaly=true"], "trainer.detect_anomaly=True: a number of one trial that is not finite"),
        (["+trainer.profiler=simple"], "trainer.profiler=simple: it would time what all trials do"),
        (["trainer.precision=bf16-mixed"], "trainer.precision=bf16-mixed: use bf16-true or 32-true"),
        (["strategy=fsdp", "trainer.devices=2", "strategy.cpu_offload=true"], "slices on the host are one trial's"),
    ],
)
def test_what_cannot_share_trains_by_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, words: list[str], reason: str
) -> None:
    caplog.set_level("INFO", logger="lightning_peft")
    found = grouped(configs(tmp_path, {"a": [], "other": words, "b": ["adapter.rank=2"]}), 4)
    assert sorted(map(sorted, found)) == [["a", "b"], ["other"]]
    (line,) = [record.getMessage() for record in caplog.records if "by itself" in record.getMessage()]
    assert line.startswith("other trains by itself: ")
    assert re.search(reason, line)


def test_trials_of_another_base_are_another_group(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="lightning_peft")
    trials = {"a": [], "b": ["quantization=nf4"], "c": ["seed=1"], "d": ["quantization=nf4", "seed=1"], "e": ["seed=2"]}
    assert grouped(configs(tmp_path, trials), 2) == [["a", "c"], ["b", "d"], ["e"]]
    assert "b trains apart from a: quantization.kind differs" in caplog.text
    smoothed = {"a": [], "b": ["objective.label_smoothing=0.1"], "c": ["objective.noise_alpha=5"]}
    assert grouped(configs(tmp_path, smoothed), 2) == [["a", "c"], ["b"]]
    assert "b trains apart from a: objective.label_smoothing differs" in caplog.text
