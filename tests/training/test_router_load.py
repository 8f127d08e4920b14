"""The load of a mixture's experts in the run's metrics, against the routers' own choices counted by hand."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import small_model

from lightning_peft.__main__ import main
from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.commands.together import train_together
from lightning_peft.compose import compose_config
from lightning_peft.models.tiny import tiny_tokenizer
from lightning_peft.quantization.experts import has_experts, routed_modules
from lightning_peft.training.activation_checkpointing import checkpoint_blocks
from lightning_peft.training.config import ActivationCheckpointing
from lightning_peft.training.router_load import RouterLoad
from lightning_peft.words import everyday


def values(load: RouterLoad) -> dict[str, float]:
    return {name: float(total / count) for name, (total, count) in load.measured().items()}


@pytest.mark.parametrize(
    ("choice", "load", "entropy"),
    [([[0, 1], [2, 3]], 1.0, 1.0), ([[2, 2], [2, 2]], 4.0, 0.0), ([[0, 1], [0, 1]], 2.0, 0.5)],
)
def test_even_use_is_one(choice: list[list[int]], load: float, entropy: float) -> None:
    model = small_model("mixtral", num_hidden_layers=1).train()
    found = RouterLoad(model)
    model.model.layers[0].mlp.experts(torch.randn(2, 64), torch.tensor(choice), torch.ones(2, 2))
    assert values(found) == pytest.approx({"router_load": load, "router_entropy": entropy}, abs=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("experts", ["none", 2])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_counts_are_the_routers_choices(family: str, experts: Any) -> None:
    """There are two forward passes, as for a loss with a reference, and a recomputation that does not count."""
    model = small_model(family)
    inject_adapters(model, LoRAConfig(rank=2, experts=experts))
    checkpoint_blocks(model, ActivationCheckpointing.blocks)
    model.train()
    found, chosen = RouterLoad(model), {}
    for name, module in model.named_modules():
        if name.endswith("mlp.experts"):
            module.register_forward_pre_hook(
                lambda module, inputs, name=name: chosen.setdefault(name, []).append(inputs[1].flatten())
            )
    model(torch.arange(3, 43)[None], use_cache=False).logits.sum().backward()
    chosen.clear()
    found.start()
    for ids in (torch.arange(3, 43), torch.arange(40, 90)):
        model(ids[None], use_cache=False)
    model.eval()(torch.arange(3, 43)[None], use_cache=False)

    shares = [
        torch.bincount(torch.cat(ids[:2]), minlength=4).double() / sum(map(len, ids[:2])) for ids in chosen.values()
    ]
    assert len(shares) == 2
    load = sum(float(share.max() * 4) for share in shares) / 2
    entropy = sum(float(-(s[s > 0] * s[s > 0].log()).sum()) for s in shares) / 2 / torch.tensor(4.0).log().item()
    assert values(found) == pytest.approx({"router_load": load, "router_entropy": entropy}, rel=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "options", "modules"),
    [
        ("longcat_flash", {"zero_expert_num": 2}, 1),
        ("gemma4_text", {"enable_moe_block": True, "moe_intermediate_size": 32, "top_k_experts": 2}, 2),
        ("granitemoehybrid", {"num_local_experts": 4, "num_experts_per_tok": 2}, 2),
        ("nemotron_h", {"layers_block_type": ["attention", "moe"]}, 1),
    ],
)
def test_experts_of_every_kind_are_counted(family: str, options: dict[str, Any], modules: int) -> None:
    model = small_model(family, **options).train()
    found = RouterLoad(model)
    model(torch.arange(3, 43)[None], use_cache=False)
    assert len(found.counts) == modules and {len(counts) for counts in found.counts.values()} <= {4, 6}
    per_token = {int(counts.sum()) / 40 for counts in found.counts.values()}
    assert per_token == {float(getattr(model.config, "num_experts_per_tok", None) or model.config.top_k_experts)}


@pytest.mark.filterwarnings("ignore")
def test_experts_without_a_choice_to_count_are_told_from_none() -> None:
    assert has_experts(small_model("llama4_text")) and not routed_modules(small_model("llama4_text"))
    assert not has_experts(small_model("llama"))


def small_mixture(tmp_path: Path) -> list[str]:
    """Return words of `train` for a mixture and a few rows in a folder."""
    small_model("mixtral", vocab_size=320).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [json.dumps({"prompt": f"Add {a}.", "completion": f"It is {a + 1}."}) + "\n" for a in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    return [
        f"model={tmp_path}/model", f"data={tmp_path}/rows.jsonl", "data.max_length=56", "rank=r2",
        "data.micro_batch_size=2", "trainer.max_steps=2", "trainer.accumulate_grad_batches=2", "schedule=constant",
        "activation_checkpointing=blocks", "trainer.accelerator=cpu", "trainer.precision=32-true",
    ]  # fmt: skip


def steps_of(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["loss"]]


def test_a_run_of_a_mixture_has_them_in_its_metrics(tmp_path: Path) -> None:
    """It has them alone, and beside another in one process, where each has those of its own rows."""
    words = small_mixture(tmp_path)
    assert main(["train", *words, f"run_dir={tmp_path}/run"]) == 0
    steps = steps_of(tmp_path / "run")
    assert len(steps) == 2
    for row in steps:
        assert 1 <= float(row["router_load"]) <= 4 and 0 < float(row["router_entropy"]) <= 1
    made = [
        compose_config("train", everyday("train", [*words, *own, f"run_dir={tmp_path}/{name}"]))
        for name, own in {"other": ["seed=5"], "same": []}.items()
    ]
    assert train_together(made, tmp_path / "list.txt") == 0
    for row, expected in zip(steps_of(tmp_path / "same"), steps, strict=True):
        for key in ("loss", "router_load", "router_entropy"):
            assert float(row[key]) == pytest.approx(float(expected[key]), rel=1e-5)
    assert steps_of(tmp_path / "other")[0]["router_load"] != steps[0]["router_load"]
