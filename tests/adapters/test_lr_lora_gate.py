"""Gates that learn a LoRA's ranks: the draws, their cost, and the plain LoRA that is left."""

import json
from pathlib import Path

import pytest
import torch
from adapter_models import adapted, config_for, logits, perturb
from peft import PeftModel
from torch import nn

from lightning_peft.adapters.inject import adapters, inject_adapters, regularization
from lightning_peft.adapters.lr_lora_gate import LRLoRAGateLinear
from lightning_peft.checkpoint.peft_format import adapter_config_from_peft, load_adapter, save_adapter
from lightning_peft.models.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def gated_model() -> nn.Module:
    """Return the tiny model with directions of its layers shut, half open and open in turn; one layer has none open."""
    model = tiny_model().eval()
    inject_adapters(model, config_for("lr_lora_gate"))
    perturb(model)
    with torch.no_grad():
        for index, (_, layer) in enumerate(adapters(model)):
            assert isinstance(layer, LRLoRAGateLinear)
            layer.lora_gate.copy_(torch.tensor([-9.0, 0.0, 9.0, -9.0]).roll(index) if index else torch.full((4,), -9.0))
    return model


def ids_logits(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_folder_is_a_plain_lora_with_a_rank_pattern(tmp_path: Path) -> None:
    """HF PEFT and we read the open directions alone, with the logits of the gated model."""
    model = gated_model()
    save_adapter(model, config_for("lr_lora_gate"), tmp_path / "a", "tiny")
    words = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (words["peft_type"], words["r"], list(words["rank_pattern"].values())) == ("LORA", 2, [1])

    theirs = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "a")).eval()
    ours = tiny_model().eval()
    inject_adapters(ours, config := adapter_config_from_peft(tmp_path / "a"))
    load_adapter(ours, tmp_path / "a")

    # Sums in another order; logits are of order 1 to 10.
    torch.testing.assert_close(ids_logits(theirs), ids_logits(model), rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(ids_logits(ours), ids_logits(model), rtol=1e-5, atol=5e-5)
    assert config.method == "lora"


def test_gates_are_drawn_in_training_alone() -> None:
    model = perturb(adapted("lr_lora_gate"))
    assert torch.equal(logits(model), logits(model))

    model.train()

    assert not torch.equal(logits(model), logits(model))


def test_penalty_is_the_share_of_gates_that_are_drawn_open() -> None:
    """The probability of eq. 12 against a hundred thousand draws, to three standard deviations of their mean."""
    layer = next(layer for _, layer in adapters(adapted("lr_lora_gate", rank=1, penalty=1.0)))
    assert isinstance(layer, LRLoRAGateLinear)
    with torch.no_grad():
        layer.lora_gate.fill_(-0.5)
        probability = float(layer.regularization())
        layer.lora_gate = nn.Parameter(torch.full((100_000,), -0.5))
        torch.manual_seed(0)
        share = float((layer.gates(drawn=True) > 0).float().mean())

    assert abs(share - probability) < 3 * (0.25 / 100_000) ** 0.5


def test_penalty_alone_shuts_the_gates() -> None:
    model = adapted("lr_lora_gate", penalty=1.0)
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if n.endswith("lora_gate")], lr=0.1)
    for _ in range(60):
        loss = regularization(model)
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    assert all((layer.gates(drawn=False) == 0).all() for _, layer in adapters(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"penalty": -1.0}, "adapter.penalty=-1.0: must be 0 or more"), ({"init": "pissa"}, "adapter.init=pissa: gates")],
)
def test_bad_option_is_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_for("lr_lora_gate", **options)
