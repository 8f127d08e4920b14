"""Every method option, stopped at a checkpoint and gone on with, ends with the weights of a run that never stopped."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import tiny_config

from lightning_peft.checkpoint.resume import checkpoint_path
from lightning_peft.commands.train import train
from lightning_peft.schemas import CONF_DIR

METHODS = sorted(path.stem for path in (CONF_DIR / "method").glob("*.yaml"))
SMALL = {
    "vera": ["adapter.rank=8", "adapter.dropout=0.1"],
    "adalora": ["adapter.rank=4", "adapter.target_rank=2", "adapter.every_n_steps=1", "adapter.final_share=0.2"],
    "intrinsic": ["adapter.dimension=20"],
    "ia3": [],
    "molf": ["adapter.expert_ranks=[4]", "optimizer.lr=1e-3"],
    "molf_e": ["adapter.expert_ranks=[2,6]", "adapter.dropout=0.1"],
    "hybrid_lora": ["adapter.rank=4", "adapter.budget=0.3"],
    "full": ["optimizer.lr=1e-3"],
}
"""Options of the run, rank 4 with dropout where there is none."""


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_resumed_run_ends_bit_equal(method: str, tmp_path: Path) -> None:
    options = [
        f"method={method}", *SMALL.get(method, ["adapter.rank=4", "adapter.dropout=0.1"]), "trainer.max_steps=6",
        "checkpoint.every_n_steps=3", "trainer.accumulate_grad_batches=2", "logger=none",
    ]  # fmt: skip
    train(tiny_config(tmp_path / "whole", *options))
    stopped = checkpoint_path(tmp_path / "whole" / "checkpoints", 3)

    train(tiny_config(tmp_path / "resumed", *options, f"resume={stopped}"))

    (file,) = (path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").glob("*/*model*.safetensors"))
    whole, resumed = (load_file(tmp_path / run / file) for run in ("whole", "resumed"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
