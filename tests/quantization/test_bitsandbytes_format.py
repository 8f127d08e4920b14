import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_peft.quantization.bitsandbytes_format import from_bitsandbytes_state, to_bitsandbytes_state
from lightning_peft.quantization.linear import QuantizedLinear

CASES = [(kind, double) for kind in ("nf4", "fp4") for double in (True, False)]


def their_layer(weight: torch.Tensor, kind: str, double: bool, storage: torch.dtype = torch.uint8) -> Linear4bit:
    layer = Linear4bit(weight.shape[1], weight.shape[0], compress_statistics=double, quant_type=kind)
    layer.weight = Params4bit(
        weight, requires_grad=False, quant_type=kind, compress_statistics=double, quant_storage=storage
    )
    return layer.to("cpu")


@pytest.mark.parametrize(("kind", "double"), CASES)
def test_our_state_is_theirs_key_by_key(kind, double):
    theirs = their_layer(torch.randn(24, 128).bfloat16(), kind, double)
    ours = QuantizedLinear.from_weight(torch.zeros(24, 128), theirs.bias, kind, 64, double)
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    theirs.weight = their_layer(weight, kind, double).weight
    ours.load_dense_(weight)
    expected, actual = theirs.state_dict(), to_bitsandbytes_state(ours)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[key], actual[key]) for key in expected)


@pytest.mark.parametrize(("kind", "double"), CASES)
def test_they_load_what_we_write(tmp_path, kind, double):
    ours = QuantizedLinear.from_weight(torch.randn(24, 128), kind=kind, double_quantization=double)
    save_file(to_bitsandbytes_state(ours), tmp_path / "layer.safetensors")
    state = load_file(tmp_path / "layer.safetensors")
    parameter = Params4bit.from_prequantized(
        state["weight"], {key: value for key, value in state.items() if key.startswith("weight.")}, device="cpu"
    )
    assert torch.equal(bnb.dequantize_4bit(parameter.data, parameter.quant_state), ours.dequantize())


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize(("kind", "double"), CASES)
def test_we_load_what_they_write(kind, double, storage):
    theirs = their_layer(torch.randn(24, 128), kind, double, storage)
    ours = from_bitsandbytes_state(theirs.state_dict())
    assert torch.equal(ours.dequantize(), bnb.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state))
    x = torch.randn(3, 128)
    torch.testing.assert_close(ours(x), theirs(x))


def test_other_levels_are_refused():
    state = their_layer(torch.randn(24, 128), "nf4", True).state_dict()
    state["weight.quant_map"] = state["weight.quant_map"] * 0.5
    with pytest.raises(ValueError, match="quant_map of the layer is not bitsandbytes' nf4 levels"):
        from_bitsandbytes_state(state)


def test_dense_state_is_refused():
    with pytest.raises(ValueError, match=r"no 4-bit layer of bitsandbytes: .* got \['bias', 'weight'\]"):
        from_bitsandbytes_state(nn.Linear(64, 8).state_dict())
