"""A method that is not in the package: one row put into `METHODS`, and everything works with nothing else edited."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from lightning_peft.adapters.bank import inject_bank, routed
from lightning_peft.adapters.base import Adapter, AdapterConfig, Target
from lightning_peft.adapters.inject import adapters, inject_adapters, trainable_parameter_counts
from lightning_peft.adapters.method import Contract, Method, linears
from lightning_peft.adapters.registry import METHODS
from lightning_peft.checkpoint.merged import merge
from lightning_peft.checkpoint.peft_format import adapter_config_from_peft, load_adapter, save_adapter
from lightning_peft.checkpoint.resume import load_trainable_state, trainable_state_dict
from lightning_peft.commands.step_estimate import empty_objective
from lightning_peft.config import TrainConfig, plain, train_config
from lightning_peft.estimation.memory import StepOptions, estimate_step
from lightning_peft.models.source import ModelConfig
from lightning_peft.models.tiny import tiny_model, tiny_tokenizer
from lightning_peft.quantization.weights import dense_weight, linear_shape


class Side(Enum):
    rows = "rows"
    columns = "columns"


@dataclass
class GainConfig(AdapterConfig):
    method: str = "gain"
    rank: int | None = None
    strength: float = 0.5
    """Factor before the trained vector."""
    side: Side = Side.rows
    """Part that the vector rescales."""

    uses_rank: ClassVar[bool] = False
    uses_alpha: ClassVar[bool] = False


class GainLinear(Adapter):
    """y = W x + strength * g * (W x), or W (strength * g * x) with the columns."""

    def __init__(self, base_layer: nn.Module, target: Target, config: GainConfig):
        super().__init__(base_layer)
        self.strength, self.side = config.strength, config.side
        size = linear_shape(base_layer)[0 if config.side is Side.rows else 1]
        self.gain = nn.Parameter(torch.empty(size, device=next(base_layer.parameters()).device))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gain)

    def adapt(self, x: Tensor, base_output: Tensor) -> Tensor:
        return base_output + nn.functional.linear(x, self.delta_weight().to(x.dtype))

    def delta_weight(self) -> Tensor:
        gain = self.strength * self.gain
        return dense_weight(self.base_layer).float() * (gain[:, None] if self.side is Side.rows else gain)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    METHODS["gain"] = Method(
        GainConfig, linears(GainLinear), trained=("gain",), contract=Contract(trained=lambda t: t.out_features)
    )
    yield
    del METHODS["gain"]


CONFIG = GainConfig(strength=0.3, side=Side.columns)
IDS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(2))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def trained_model(config: AdapterConfig = CONFIG) -> nn.Module:
    model = tiny_model()
    inject_adapters(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in adapters(model):
            layer.gain.copy_(torch.randn(layer.gain.shape, generator=generator))
    return model.eval()


def test_it_is_injected_and_trains_what_it_says() -> None:
    model = tiny_model()
    base = logits(model)
    names = inject_adapters(model, GainConfig())

    assert torch.equal(logits(model), base)
    rows = sum(linear_shape(layer.base_layer)[0] for _, layer in adapters(model))
    assert len(names) == len(list(adapters(model))) and trainable_parameter_counts(model)[0] == rows
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(layer.gain.grad.abs().max() > 0 for _, layer in adapters(model))


def test_a_saved_folder_comes_back_with_its_options(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    model = trained_model()
    save_adapter(model, CONFIG, tmp_path / "a", "tiny")

    config = adapter_config_from_peft(tmp_path / "a")
    fresh = tiny_model()
    inject_adapters(fresh, config)
    load_adapter(fresh, tmp_path / "a")

    assert isinstance(config, GainConfig) and (config.strength, config.side) == (0.3, Side.columns)
    assert torch.equal(logits(fresh), logits(model))
    assert "HF PEFT has no method gain" in caplog.text


def test_a_checkpoint_resumes_it() -> None:
    model, fresh = trained_model(), tiny_model()
    inject_adapters(fresh, CONFIG)
    load_trainable_state(fresh, trainable_state_dict(model))

    assert torch.equal(logits(fresh), logits(model))


def test_it_merges(tmp_path: Path) -> None:
    model = trained_model()
    expected = logits(model)
    receipt = merge(model, tiny_tokenizer(), tmp_path / "out", [IDS])

    assert receipt.recovered > 0.999
    # fp32 sums in another order.
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path / "out")), expected, rtol=1e-5, atol=5e-5)


def test_a_bank_holds_it() -> None:
    alone, bank = logits(trained_model()), tiny_model()
    inject_bank(
        bank, [CONFIG, CONFIG], lambda model, _: load_trainable_state(model, trainable_state_dict(trained_model()))
    )

    with routed(bank, [1, -1]):
        together = logits(bank)
    torch.testing.assert_close(together[0], alone[0], rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(together[1], logits(tiny_model())[1], rtol=1e-5, atol=5e-5)


def test_a_run_of_it_is_typed_again_and_estimated() -> None:
    config = TrainConfig(adapter=CONFIG)
    assert train_config(plain(config)).adapter == CONFIG

    objective = empty_objective(TrainConfig(adapter=CONFIG, model=ModelConfig(name="tiny")), torch.float32)
    estimate = estimate_step(objective, StepOptions(rows=2, length=32, optimizer="adamw"))
    trained = sum(4 * layer.gain.numel() for _, layer in adapters(trained_model()))
    (states,) = [component for component in estimate.components if component.name == "optimiser states"]
    assert states.largest == 2 * trained
