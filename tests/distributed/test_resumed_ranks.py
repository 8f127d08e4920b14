"""Checkpoints of several processes: any optimiser, at another number of processes, under another strategy."""

import pytest
import torch
from rank_runs import adapter, column, train_on_ranks

from lightning_peft.optim.optimizers import OPTIMIZERS, OptimizerConfig

PLAIN = [name for name, choice in OPTIMIZERS.items() if choice.config is OptimizerConfig]
"""Optimisers of any method; routed_adamw is MoLF's."""

RUN = ["method=qlora", "data.packing=false", "checkpoint.every_n_steps=2", "resume=auto", "schedule=constant",
       "schedule.warmup_steps=0", "adapter.dropout=0.1", "rank=r64"]  # fmt: skip
"""Rank 64: matrices of 4,096 elements and more on each of two ranks, so that 8-bit optimisers use 8 bits."""
SETTINGS = {
    "single": ["trainer.accumulate_grad_batches=2"],
    "ddp2": ["strategy=ddp"],
    "fsdp2": ["strategy=fsdp"],
}
CHANGES = [("fsdp2", "ddp2"), ("ddp2", "fsdp2"), ("fsdp2", "single"), ("single", "fsdp2")]


def steps(count: int) -> list[str]:
    return [f"trainer.max_steps={count}"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed")

    def several(setting: str, count: int) -> dict[str, list[str]]:
        """Train runs that start in a setting; the second half starts anew where the first stopped."""
        own = [*RUN, *SETTINGS[setting], *steps(count)]
        runs = {f"{before}_{after}": own for before, after in CHANGES if (before if count == 2 else after) == setting}
        if setting == "fsdp2":
            runs |= {f"halted_{name}": [*own, f"optimizer={name}"] for name in PLAIN}
            runs |= {f"straight_{name}": [*own, f"optimizer={name}"] for name in PLAIN if count == 4}
        return runs

    train_on_ranks(1, folder, several("single", 2) | {"one": [*RUN, *SETTINGS["single"], *steps(4)]})
    train_on_ranks(2, folder, several("ddp2", 2) | several("fsdp2", 2))
    train_on_ranks(2, folder, several("ddp2", 4) | several("fsdp2", 4))
    train_on_ranks(1, folder, several("single", 4))
    return folder


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("name", PLAIN)
def test_resume_under_fsdp_is_bit_equal(runs, name):
    halted, straight = runs / f"halted_{name}", runs / f"straight_{name}"
    assert column(halted, "loss") == column(straight, "loss")
    ours, expected = adapter(halted), adapter(straight)
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_run_goes_on_under_another_strategy(runs, before, after):
    changed = runs / f"{before}_{after}"
    assert not (changed / "error.txt").exists(), (changed / "error.txt").read_text()
    # The dropout of a micro batch is drawn from its place in the data, whichever process has it.
    torch.testing.assert_close(column(changed, "loss"), column(runs / "one", "loss"), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.multi_process
def test_8bit_optimiser_takes_the_steps_of_one_process(runs):
    # 8 bits are coarse, but the blocks of 256 values fall alike when a rank's rows are a multiple of them.
    torch.testing.assert_close(
        column(runs / "straight_adamw_8bit", "loss"), column(runs / "one", "loss"), rtol=5e-3, atol=0
    )


@pytest.mark.slow
@pytest.mark.multi_process
def test_checkpoint_is_hardly_larger_than_adapter_and_optimiser(runs):
    run = runs / "straight_adamw"
    floats = sum(tensor.numel() for tensor in adapter(run).values())
    newest = max((run / "checkpoints").glob("*.ckpt"))
    assert newest.stat().st_size < 1.1 * (3 * 4 * floats) + 200_000  # loops, loader and names of a tiny run
