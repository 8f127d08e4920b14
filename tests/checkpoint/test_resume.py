"""Checkpoints that survive kills, full disks and damage, and hold trainable state only."""

import contextlib
import json
import os
import resource
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from started import run
from training import SaveEachStep, TinyFinetune, batches, trainer

from lightning_peft.adapters.inject import adapters, inject_adapters
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.checkpoint.atomic import SaveError, partial_path
from lightning_peft.checkpoint.resume import (
    AtomicCheckpointIO,
    CheckpointFileError,
    checkpoint_path,
    checkpoints,
    latest_checkpoint,
    load_trainable_state,
    trainable_state_dict,
)
from lightning_peft.models.tiny import tiny_model
from lightning_peft.runs.folder import check_same_config

# torch 2.13 deprecates what torchdata 0.11 calls.
pytestmark = pytest.mark.filterwarnings("ignore:.set_vital. is deprecated:UserWarning")

IO = AtomicCheckpointIO()


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        IO.save_checkpoint({"step": step, "weights": torch.full((1000,), float(step))}, checkpoint_path(folder, step))


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    save(tmp_path, 7)

    loaded = IO.load_checkpoint(checkpoint_path(tmp_path, 7))

    assert loaded["step"] == 7
    assert torch.equal(loaded["weights"], torch.full((1000,), 7.0))


def test_keep_last_counts_only_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "step-notes.ckpt").write_text("mine")
    (tmp_path / "best.ckpt").write_text("mine")
    for step in (5, 10, 100, 15):
        AtomicCheckpointIO(keep_last=2).save_checkpoint({"step": step}, checkpoint_path(tmp_path, step))

    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000015.ckpt", "step-00000100.ckpt"]
    assert (tmp_path / "step-notes.ckpt").exists() and (tmp_path / "best.ckpt").exists()


def test_asynchronous_save_keeps_what_was_given(tmp_path: Path) -> None:
    background = AtomicCheckpointIO(keep_last=1, asynchronous=True)
    weights = torch.zeros(1000)
    for step in (1, 2):
        background.save_checkpoint({"weights": weights}, checkpoint_path(tmp_path, step))
        weights.add_(1)
    background.teardown()

    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002.ckpt"]
    assert torch.equal(IO.load_checkpoint(checkpoint_path(tmp_path, 2))["weights"], torch.ones(1000))


def test_asynchronous_save_returns_at_once_and_its_error_comes_with_the_next(tmp_path: Path) -> None:
    background = AtomicCheckpointIO(asynchronous=True)
    first = checkpoint_path(tmp_path, 1)
    os.mkfifo(partial_path(first))  # opened for writing it blocks until somebody reads
    background.save_checkpoint({"step": 1}, first)
    assert background.writing is not None and not background.writing.done()
    assert partial_path(first).read_bytes()[:2] == b"PK"

    with pytest.raises(CheckpointFileError, match="step-00000001.ckpt.partial: no such checkpoint file"):
        background.save_checkpoint({"step": 2}, checkpoint_path(tmp_path, 2))


def test_keep_last_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="checkpoint.keep_last=0: must be at least 1"):
        AtomicCheckpointIO(keep_last=0)


def flip_bit(path: Path) -> None:
    """Flip a bit in the middle of the largest tensor: the padding between the records of the file would not matter."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
        data = archive.read(largest)
    content = bytearray(path.read_bytes())
    content[content.index(data, largest.header_offset) + len(data) // 2] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-700]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "one bit": flip_bit,
    "text": lambda path: path.write_text("not a checkpoint"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoint_is_named(name: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    DAMAGE[name](checkpoint_path(tmp_path, 1))

    with pytest.raises(
        CheckpointFileError, match="step-00000001.ckpt: (truncated or not a checkpoint|damaged)"
    ) as caught:
        IO.load_checkpoint(checkpoint_path(tmp_path, 1))

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", DAMAGE)
def test_latest_falls_back_to_the_one_before(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1, 2)
    DAMAGE[name](checkpoint_path(tmp_path, 2))

    assert latest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 1)
    assert "step-00000002.ckpt" in caplog.text and "trying the one before it" in caplog.text


def test_latest_ignores_files_being_written(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".step-00000002.ckpt.partial").write_bytes(b"half")

    assert latest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 1)


def test_latest_of_nothing_is_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "absent") is None


def test_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointFileError, match="absent.ckpt: no such checkpoint file"):
        IO.load_checkpoint(tmp_path / "absent.ckpt")


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    torch.save({"path": Path("x")}, tmp_path / "a.ckpt")

    with pytest.raises(CheckpointFileError, match="a.ckpt: not a checkpoint of this program") as caught:
        IO.load_checkpoint(tmp_path / "a.ckpt")

    assert "\n" not in str(caught.value)


@contextlib.contextmanager
def largest_file(size: int) -> Any:
    """Let writing beyond `size` bytes fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_leaves_the_previous_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, 1)

    with largest_file(2000), pytest.raises(SaveError, match="step-00000002.ckpt: cannot be saved .*File too large"):
        save(tmp_path, 2)

    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.ckpt"]
    assert latest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 1)


def test_saving_again_under_the_same_name_survives_a_full_disk(tmp_path: Path) -> None:
    save(tmp_path, 1)

    with largest_file(2000), pytest.raises(SaveError):
        IO.save_checkpoint({"weights": torch.zeros(5000)}, checkpoint_path(tmp_path, 1))

    assert IO.load_checkpoint(checkpoint_path(tmp_path, 1))["step"] == 1


def test_checkpoint_is_at_most_a_tenth_above_adapter_and_optimizer(tmp_path: Path) -> None:
    module = TinyFinetune(rank=16)
    trainer(tmp_path, steps=2, keep_last=1).fit(module, batches())

    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    base = sum(p.numel() for p in module.parameters()) - trained
    adapter_and_optimizer = trained * 4 * 3

    assert checkpoint_path(tmp_path, 2).stat().st_size <= 1.1 * adapter_and_optimizer < adapter_and_optimizer + base * 4


def test_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    whole = TinyFinetune()
    trainer(tmp_path / "whole", steps=6).fit(whole, batches())
    part = TinyFinetune()
    trainer(tmp_path / "part", steps=3).fit(part, batches())

    resumed = TinyFinetune()
    resumed_trainer = trainer(tmp_path / "part", steps=6)
    resumed_trainer.fit(resumed, batches(), ckpt_path=latest_checkpoint(tmp_path / "part"))

    assert resumed_trainer.global_step == 6
    expected, got = trainable_state_dict(whole.model), trainable_state_dict(resumed.model)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert not torch.equal(got["model.layers.0.mlp.up_proj.lora_B.weight"], torch.zeros(128, 4))


def test_resume_with_another_rank_is_one_line(tmp_path: Path) -> None:
    trainer(tmp_path, steps=1).fit(TinyFinetune(rank=4), batches())

    with pytest.raises(CheckpointFileError, match=r"has shape \(4, 64\), this model needs \(8, 64\)"):
        trainer(tmp_path, steps=2).fit(TinyFinetune(rank=8), batches(), ckpt_path=latest_checkpoint(tmp_path))


def test_damage_between_check_and_fit_stops_the_run(tmp_path: Path) -> None:
    trainer(tmp_path, steps=1).fit(TinyFinetune(), batches())
    flip_bit(checkpoint_path(tmp_path, 1))

    with pytest.raises(CheckpointFileError, match="step-00000001.ckpt: damaged"):
        trainer(tmp_path, steps=2).fit(TinyFinetune(), batches(), ckpt_path=checkpoint_path(tmp_path, 1))


def test_full_disk_during_training_stops_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    size_after_one = []

    def fill(step: int) -> None:
        size_after_one.append(checkpoint_path(tmp_path, step).stat().st_size)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_after_one[0] // 2, resource.RLIM_INFINITY))

    with largest_file(resource.RLIM_INFINITY), pytest.raises(SaveError, match="step-00000002.ckpt: cannot be saved"):
        trainer(tmp_path, steps=5, callbacks=[SaveEachStep(tmp_path, after=fill)]).fit(TinyFinetune(), batches())

    assert latest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 1)


@pytest.mark.slow
def test_sigkill_during_saves_always_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    script = Path(__file__).with_name("kill_during_save.py")

    result = run([sys.executable, script, tmp_path, "4"])

    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(result.stdout)["killed_while_saving"] >= 1


@pytest.mark.slow
def test_sigkill_sixty_times(tmp_path: Path) -> None:
    script = Path(__file__).with_name("kill_during_save.py")

    result = run([sys.executable, script, tmp_path, "60"])

    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(result.stdout)["killed_while_saving"] >= 10


def test_trainable_state_holds_adapters_and_trained_modules_only() -> None:
    model = tiny_model()
    inject_adapters(model, LoRAConfig(rank=4, target_modules=["q_proj"], trainable_modules=["norm"]))

    state = trainable_state_dict(model)

    assert set(state) == {
        *(f"model.layers.{i}.self_attn.q_proj.lora_{ab}.weight" for i in (0, 1) for ab in "AB"),
        "model.norm.weight",
    }


def test_frozen_factor_and_buffers_of_an_adapter_are_state_too() -> None:
    model = tiny_model()
    inject_adapters(model, LoRAConfig(rank=4, target_modules=["q_proj"]))
    name, layer = next(adapters(model))
    layer.lora_A.requires_grad_(False)
    layer.register_buffer("importance", torch.arange(3.0))

    state = trainable_state_dict(model)

    assert torch.equal(state[f"{name}.importance"], torch.arange(3.0))
    assert f"{name}.lora_A.weight" in state and not any("base_layer" in n for n in state)


def test_trainable_state_restores_every_value() -> None:
    first, second = (tiny_model() for _ in range(2))
    for seed, model in enumerate((first, second)):
        torch.manual_seed(seed)
        inject_adapters(model, LoRAConfig(rank=4, trainable_modules=["norm"]))

    load_trainable_state(second, trainable_state_dict(first))

    expected = trainable_state_dict(first)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trainable_state_dict(second).items())


def test_ranks_that_eva_spread_come_back() -> None:
    config = LoRAConfig(rank=4, init="eva")
    first, second = tiny_model(), tiny_model()
    inject_adapters(first, config)
    inject_adapters(second, config)
    layer = first.get_submodule("model.layers.0.mlp.up_proj")
    layer.set_factors(torch.randn(7, 64), torch.randn(128, 7))

    load_trainable_state(second, trainable_state_dict(first))

    input_ids = torch.arange(20)[None]
    assert torch.equal(first(input_ids=input_ids).logits, second(input_ids=input_ids).logits)


def test_missing_and_unexpected_names_are_listed() -> None:
    model = tiny_model()
    inject_adapters(model, LoRAConfig(rank=4))
    state = trainable_state_dict(model)
    gone = state.pop("model.layers.0.mlp.up_proj.lora_A.weight")

    with pytest.raises(CheckpointFileError, match="checkpoint: lacks model.layers.0.mlp.up_proj.lora_A.weight: was it"):
        load_trainable_state(model, state)
    with pytest.raises(CheckpointFileError, match="has, and this model does not, extra"):
        load_trainable_state(model, {**state, "model.layers.0.mlp.up_proj.lora_A.weight": gone, "extra": gone})


CONFIG = {"seed": 1, "trainer": {"max_steps": 10, "precision": "auto"}, "adapter": {"rank": 4, "exclude_modules": []}}


def changed(**parts: Any) -> dict[str, Any]:
    return {key: value | parts.get(key, {}) if isinstance(value, dict) else value for key, value in CONFIG.items()}


def test_same_config_and_longer_training_may_resume() -> None:
    check_same_config(CONFIG, changed(trainer={"max_steps": 20, "max_epochs": 3}))


def test_tokens_may_be_kept_elsewhere() -> None:
    check_same_config(CONFIG | {"data": {"cache_dir": "auto"}}, CONFIG | {"data": {"cache_dir": None}})


def test_changed_config_names_every_key() -> None:
    with pytest.raises(
        ValueError, match=r"adapter.rank \(was 4, is 8\), trainer.precision \(was 'auto', is not set\); "
    ):
        now = changed(adapter={"rank": 8})
        del now["trainer"]["precision"]
        check_same_config(CONFIG, now)
