"""Runs that share slices of one base, two processes each: every one is what it is by itself under fsdp."""

import json
import os
import signal
import time
from pathlib import Path
from subprocess import DEVNULL, PIPE

import pytest
from equal_runs import assert_equal_runs
from rank_runs import train_on_ranks
from started import COMMAND, Started, run, run_on_ranks
from test_together import assert_as_alone, result
from tiny_runs import TINY, tiny_config

from lightning_peft.commands.together import grouped, train_together
from lightning_peft.commands.train import train
from lightning_peft.sweeps.sweep import changed_sweep, refresh

SHARDED = ["strategy=fsdp", "trainer.devices=2", "trainer.max_steps=3", "checkpoint.every_n_steps=2"]
TRIALS: dict[str, list[str]] = {
    "odd": ["adapter.rank=3", "adapter.alpha=8", "validation.every_n_steps=2", "data.packing=false"],
    "dropped": [
        "data.packing=false",
        "method=rslora",
        "adapter.rank=8",
        "adapter.dropout=0.3",
        "optimizer.lr=0.003",
        "seed=3",
    ],
    "windows": ["data.micro_batch_size=2", "trainer.accumulate_grad_batches=3", "trainer.gradient_clip_val=0.1"],
    "frozen": ["method=lora_fa", "adapter.rank=4", "adapter.target_modules=[q_proj,down_proj]", "adapter.layers=1"],
}
"""A rank that two processes cannot cut evenly, masks, windows, and factors that do not train."""


def train_both_ways(folder: Path, trials: dict[str, list[str]]) -> None:
    """Train runs in one group and each by itself, on two ranks, and assert that they are the same."""
    configs = {name: tiny_config(folder / "together" / name, *own) for name, own in trials.items()}
    assert grouped(configs, 8) == [list(trials)]
    assert train_together(list(configs.values()), folder / "list.txt") == 0
    (folder / "alone").mkdir()
    train_on_ranks(2, folder / "alone", {name: [*TINY, *own] for name, own in trials.items()})
    for name in trials:
        assert_as_alone(folder / "together" / name, folder / "alone" / name)


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["quantization=none"], list(TRIALS)),
        (["quantization=nf4", "activation_checkpointing=blocks"], ["odd", "dropped"]),
    ],
    ids=["dense", "nf4"],
)
def test_each_run_under_fsdp_is_what_it_is_alone(tmp_path: Path, words: list[str], names: list[str]) -> None:
    trials = {name: [*SHARDED, *words, *TRIALS[name]] for name in names}
    train_both_ways(tmp_path, trials)
    for name in names:
        found, expected = result(tmp_path / "together" / name), result(tmp_path / "alone" / name)
        for key in ("status", "steps", "end", "data", "trainable_parameters", "total_parameters"):
            assert found[key] == expected[key]


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_runs_that_fill_passes_take_turns_alike_on_every_rank(tmp_path: Path, strategy: str) -> None:
    """Two or three rows fill a pass, and the ranks' rows are not of one length."""
    words = [f"strategy={strategy}", "trainer.devices=2", "trainer.max_steps=4"]
    words += ["data.packing=false", "data.micro_batch_size=1"]
    trials = {f"rank{rank}": [*words, f"adapter.rank={rank}", f"seed={rank}"] for rank in (2, 3, 4, 8)}
    train_both_ways(tmp_path, trials)


@pytest.mark.slow
@pytest.mark.multi_process
def test_one_run_leaves_the_others_and_goes_on_alone(tmp_path: Path) -> None:
    trials = {name: [*SHARDED, *TRIALS[name]] for name in ("odd", "dropped")}
    early = tiny_config(tmp_path / "odd", *trials["odd"], "pause_at=1")
    assert train_together([early, tiny_config(tmp_path / "dropped", *trials["dropped"])], tmp_path / "list.txt") == 75
    assert [result(tmp_path / name)["status"] for name in trials] == ["paused", "finished"]
    train(tiny_config(tmp_path / "odd", *trials["odd"], "resume=auto"))
    train(tiny_config(tmp_path / "alone", *trials["odd"]))
    assert_as_alone(tmp_path / "odd", tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("ranks", [2, 3])  # three cannot cut its weights evenly
def test_models_around_a_sliced_base_are_it_and_hold_it_once(tmp_path: Path, ranks: int) -> None:
    run_on_ranks(ranks, Path(__file__).with_name("sliced_base_on_ranks.py"), tmp_path / "found.json")
    of_all = json.loads((tmp_path / "found.json").read_text())
    assert len(of_all) == 4 * ranks
    for found in of_all:
        assert found["parameters"] >= 20 and found["is_shared"]
        assert found["difference"] < 1e-5


@pytest.mark.multi_process
def test_run_that_fails_on_one_rank_ends_its_group_and_one_that_fails_on_all_does_not(tmp_path: Path) -> None:
    run_on_ranks(2, Path(__file__).with_name("failing_member_on_ranks.py"), tmp_path / "found.json")
    on_all, late_on_one, on_one, seconds = json.loads((tmp_path / "found.json").read_text())
    assert on_all == late_on_one == ["a full disk", "20.0"]
    assert on_one[0].startswith("first failed on rank 0 and not on all (ValueError: a full disk)")
    assert seconds < 20  # the other rank waits for this one, and so has gone on


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_group_whose_rank_is_killed_ends_in_seconds_and_goes_on(tmp_path: Path, kind: str) -> None:
    words = [
        *TINY,
        f"strategy={kind}",
        *SHARDED[1:],
        "trainer.max_steps=40",
        "validation.every_n_steps=20",
        "adapter.dropout=0.1",
    ]
    command = [*COMMAND, "train", "-m", *words, "adapter.rank=2,4", "sweep.together=2", "resume=auto"]
    folder = tmp_path / "killed"
    with Started([*command, f"run_dir={folder}"], stdout=DEVNULL, stderr=PIPE, text=True) as process:
        wait_until(folder / "rank4" / "checkpoints" / "step-00000010.ckpt")
        killed_at = time.monotonic()
        os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
        said = process.communicate(timeout=60)[1]
    assert time.monotonic() - killed_at < 20
    assert process.returncode == 128 + signal.SIGKILL and "error: rank 1 was ended by SIGKILL" in said
    with changed_sweep(folder) as sweep:
        refresh(sweep, folder, {})
        assert {trial.name: trial.state for trial in sweep.trials} == {"rank2": "failed", "rank4": "failed"}
    for name in (folder, tmp_path / "undisturbed"):
        assert run([*command, f"run_dir={name}"]).returncode == 0
    for name in ("rank2", "rank4"):
        assert_equal_runs(folder / name, tmp_path / "undisturbed" / name)


def ranks_of(launcher: int) -> list[int]:
    """Return the processes of the ranks that a process has started, in their order."""
    found = [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]
    return sorted(found, key=lambda pid: b"\0LOCAL_RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())


def wait_until(path: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_answers_and_their_scores_are_those_of_a_run_alone(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Path(__file__).parent  # has the metric
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])]))
    common = [
        f"strategy={kind}", *SHARDED[1:], "validation.every_n_steps=2", "validation.samples=3",
        "validation.metrics=[answer_lengths:characters]", "validation.metric_rows=3", "validation.max_new_tokens=8",
        "validation.budget=null",
    ]  # fmt: skip
    trials = {name: [*common, *TRIALS[name]] for name in ("odd", "dropped")}
    train_both_ways(tmp_path, trials)
    for name in trials:
        answers, expected = ((tmp_path / way / name / "samples.jsonl").read_text() for way in ("together", "alone"))
        assert answers == expected and len(answers.splitlines()) == 3
        found, wanted = (result(tmp_path / way / name)["metrics"] for way in ("together", "alone"))
        assert found == wanted and wanted["characters"] > 0
