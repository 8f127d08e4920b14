"""Preference objectives on several processes: the numbers of one process on the same global batch."""

from pathlib import Path

import pytest
import torch
from rank_runs import adapter, column, train_on_ranks
from started import run_on_ranks

OBJECTIVES = {
    "dpo": ["objective=dpo", "method=qlora"],
    "distill": ["objective=distill", "objective.divergence=jsd", "method=qlora"],
    "reward": ["objective=reward", "objective.centering=0.01", "method=qlora"],
    "kept": ["objective=distill", "objective.teacher=tiny_tied", "objective.teacher_top_k=8", "method=qlora"],
}
REFUSED = {("fsdp", "distill")}
STEPS = ["trainer.max_steps=4", "data.packing=true", "data.max_length=512", "data.on_too_long=skip"]
MEASURED = {
    "dpo": ("rewards/margin", "rewards/accuracy", "logps/chosen"),
    "distill": ("cross_entropy", "divergence"),
    "reward": ("rewards/margin", "rewards/accuracy", "rewards/chosen"),
    "kept": ("cross_entropy", "divergence"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objectives")
    for ranks, kinds in ((1, ("single",)), (2, ("ddp", "fsdp"))):
        words = [*STEPS, f"trainer.accumulate_grad_batches={2 // ranks}"]
        several = {
            f"{kind}_{name}": [*words, *own, *([f"strategy={kind}"] if ranks > 1 else [])]
            for kind in kinds
            for name, own in OBJECTIVES.items()
            if (kind, name) not in REFUSED
        }
        train_on_ranks(ranks, folder, several)
    return folder


@pytest.mark.multi_process
@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in ("ddp", "fsdp") for name in OBJECTIVES if (kind, name) not in REFUSED]
)
def test_steps_equal_those_of_one_process(runs, kind, name):
    one, several = runs / f"single_{name}", runs / f"{kind}_{name}"
    assert len(column(one, "loss")) == 4
    for measured in ("loss", "grad_norm", "supervised_tokens", *MEASURED[name]):
        # Sums over the ranks are taken in another order.
        torch.testing.assert_close(column(several, measured), column(one, measured), rtol=1e-4, atol=1e-4)
    for parameter, expected in adapter(one).items():
        torch.testing.assert_close(adapter(several)[parameter], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.multi_process
def test_ranks_wait_for_a_teacher_longer_than_they_may_be_silent(tmp_path):
    run_on_ranks(2, Path(__file__).with_name("long_steps.py"), tmp_path)
    unseen = "data.cache_dir=own: rank 1 does not see what rank 0 writes there, and reads what is kept of the teacher"
    for rank in range(2):
        found = (tmp_path / f"rank{rank}.txt").read_text().split("|")
        assert found == ["done", "late", "wrong at the end", "fine", unseen]
    assert [path.name for path in tmp_path.glob("*/*")] == []
