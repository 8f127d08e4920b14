"""Metrics of generated answers are those of one process, whoever answers."""

import pytest
from rank_runs import result, train_on_ranks

STEPS = [
    "trainer.max_steps=2", "data.packing=true", "data.max_length=512", "validation.every_n_steps=1",
    "validation.max_new_tokens=6", "validation.metric_rows=3", "validation.budget=null",
    "validation.metrics=[answer_lengths:characters]", "checkpoint.best_by=-characters",
]  # fmt: skip
BASES = {"dense": ["method=lora"], "nf4": ["method=qlora"]}


@pytest.mark.multi_process
def test_ranks_answer_as_one_process(tmp_path):
    one = {f"one_{name}": [*words, *STEPS, "trainer.accumulate_grad_batches=2"] for name, words in BASES.items()}
    two = {
        f"{kind}_{name}": [*words, *STEPS, f"strategy={kind}"]
        for name, words in BASES.items()
        for kind in ("ddp", "fsdp")
    }
    train_on_ranks(1, tmp_path, one)
    train_on_ranks(2, tmp_path, two)
    for name in BASES:
        expected = result(tmp_path / f"one_{name}")["metrics"]
        assert expected["characters"] > 0
        for kind in ("ddp", "fsdp"):
            assert result(tmp_path / f"{kind}_{name}")["metrics"] == expected
            assert (tmp_path / f"{kind}_{name}" / "adapter_best" / "adapter_model.safetensors").exists()
