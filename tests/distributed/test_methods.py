"""Every method, on a dense and on a 4-bit base, takes on two processes the steps it takes on one."""

import re

import pytest
import torch
from rank_runs import column, result, train_on_ranks

from lightning_peft.schemas import CONF_DIR

METHODS = sorted({path.stem for path in (CONF_DIR / "method").glob("*.yaml")} - {"qlora", "qdora"})
"""Methods without those that are another one on a 4-bit base."""
BASES = ["none", "nf4"]
NO_MEANING = {("full", "nf4"), ("molf", "nf4"), ("loftq", "none")}
"""Methods that are refused on one process too."""
SMALL = {"molf": ["adapter.expert_ranks=[4]"], "hybrid_lora": ["adapter.budget=0.3"]}
"""Options that suit a model of two blocks."""
REFUSED = {
    ("adalora", "fsdp"): "method=adalora strategy=fsdp: its penalty reads whole matrices .*; use strategy=ddp",
    ("lr_lora_gate", "fsdp"): "method=lr_lora_gate strategy=fsdp: its penalty reads the gates .*; use strategy=ddp",
}
SETTINGS = {
    "single": ["strategy=single", "trainer.accumulate_grad_batches=2"],
    "ddp": ["strategy=ddp"],
    "fsdp": ["strategy=fsdp"],
}
CASES = [(method, base) for method in METHODS for base in BASES if (method, base) not in NO_MEANING]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")

    def every(kind: str) -> dict[str, list[str]]:
        words = ["trainer.max_steps=2", *SETTINGS[kind]]
        return {
            f"{kind}_{method}_{base}": [f"method={method}", f"quantization={base}", *SMALL.get(method, []), *words]
            for method, base in CASES
        }

    train_on_ranks(1, folder, every("single"))
    train_on_ranks(2, folder, every("ddp") | every("fsdp"), seconds=900)
    return folder


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize(("method", "base"), CASES)
def test_method_takes_the_steps_of_one_process(runs, method, base, kind):
    one, two = runs / f"single_{method}_{base}", runs / f"{kind}_{method}_{base}"
    if (method, kind) in REFUSED:
        assert re.match(REFUSED[method, kind], (two / "error.txt").read_text())
        assert [path.name for path in two.iterdir()] == ["error.txt"]  # this came before anything was loaded or written
        return
    assert not (two / "error.txt").exists(), (two / "error.txt").read_text()
    assert len(column(one, "loss")) == 2
    for name in ("loss", "grad_norm", "supervised_tokens"):
        # fp32 noise: sums over the ranks are taken in another order.
        torch.testing.assert_close(column(two, name), column(one, name), rtol=5e-5, atol=5e-6)
    assert result(two)["validation_loss"] == pytest.approx(result(one)["validation_loss"], rel=5e-5)
