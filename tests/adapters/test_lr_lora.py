"""LR-LoRA's bent product: the kernel against torch.sinc, and its reach."""

from pathlib import Path

import pytest
import torch
from adapter_models import adapted, config_for, llama, perturb, tokens, wrapped
from torch import Tensor, nn

from lightning_peft.adapters.inject import adapters, inject_adapters, trainable_parameter_counts
from lightning_peft.adapters.lr_lora import LRLoRAConfig, LRLoRALinear
from lightning_peft.checkpoint.peft_format import adapter_config_from_peft, load_adapter, save_adapter
from lightning_peft.checkpoint.peft_words import AdapterFileError
from lightning_peft.kernels import sinc
from lightning_peft.kernels.sinc import Grid, bent, sinc_product

GRID = Grid(-0.8, 1.6 / 7, 8)


def plainly(z: Tensor, c: Tensor, width: Tensor) -> Tensor:
    """Return the formula of the layer, a function of torch for each node."""
    nodes = [GRID.first + i * GRID.step for i in range(GRID.nodes)]
    terms = [torch.sinc((z / width - t) / GRID.step) - torch.sinc(z.new_tensor(t / GRID.step)) for t in nodes]
    return z + width * sum(c_i * term for c_i, term in zip(c, terms, strict=True))


def test_sinc_product_passes_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinc, "ELEMENTS_AT_ONCE", 12)  # two rows of seven at a time
    torch.manual_seed(0)
    shapes = [(2, 3, 5), (2, 5), (7, 2), (8,)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    width = torch.full((1,), 1.3, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(lambda *values: sinc_product(*values, GRID), (*inputs, width))


def test_one_sine_serves_all_nodes_in_fp32() -> None:
    """Values and slopes are those of torch.sinc in fp64, at the nodes and close to them as elsewhere."""
    nodes = torch.tensor([GRID.first + i * GRID.step for i in range(GRID.nodes)])
    near = torch.cat([nodes + side for side in (-1e-3, -1e-6, 0.0, 1e-6, 1e-3, 0.02)])
    z = torch.cat([torch.linspace(-3, 3, 10_001), near])
    c, one = torch.randn(8, generator=torch.Generator().manual_seed(1)), torch.ones(1)
    exact = z.double().requires_grad_()
    expected = plainly(exact, c.double(), one.double())
    (slopes,) = torch.autograd.grad(expected.sum(), exact)

    x, A = torch.eye(len(z)), z[None].clone().requires_grad_()
    B = torch.ones(1, 1)
    product = sinc_product(x, A, B, c, one, GRID)
    (found,) = torch.autograd.grad(product.sum(), A)

    # fp32: places of up to 17 are rounded at 1e-6, and a slope's quotient at 1e-6 of a distance of 0.1.
    torch.testing.assert_close(bent(z, c, one, GRID).double(), expected.detach(), rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(found[0].double(), slopes, rtol=1e-5, atol=5e-5)


def test_without_coefficients_it_is_lora() -> None:
    bent_model, lora = adapted("lr_lora"), adapted("lora")
    with torch.no_grad():
        for (_, one), (_, other) in zip(adapters(bent_model), adapters(lora), strict=True):
            for factor in "AB":
                values = getattr(one, f"lora_{factor}").normal_(std=0.1)
                getattr(other, f"lora_{factor}").weight.copy_(values)
    outputs = [model(tokens(), use_cache=False).logits for model in (bent_model, lora)]
    for output in outputs:
        output.square().mean().backward()

    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    for (_, one), (_, other) in zip(adapters(bent_model), adapters(lora), strict=True):
        torch.testing.assert_close(one.lora_A.grad, other.lora_A.weight.grad, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(one.lora_B.grad, other.lora_B.weight.grad, rtol=1e-3, atol=1e-6)


def test_bent_change_has_a_rank_above_its_factors() -> None:
    layer = wrapped(LRLoRALinear, nn.Linear(32, 24), rank=2)
    nn.init.normal_(layer.lora_B)
    assert torch.linalg.matrix_rank(layer.delta_weight()) == 2 and layer.low_rank() is not None

    nn.init.normal_(layer.lora_c)

    assert torch.linalg.matrix_rank(layer.delta_weight()) == 24 and layer.low_rank() is None


def test_one_set_of_coefficients_has_the_gradients_of_all_layers() -> None:
    own, one = adapted("lr_lora"), adapted("lr_lora", share="model")
    for model in (own, one):
        with torch.no_grad():
            for _, layer in adapters(model):
                layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(2)) / 10)
                layer.lora_c.copy_(torch.linspace(-1, 1, 8))
        model(tokens(), use_cache=False).logits.square().mean().backward()
    apart, together = ([layer for _, layer in adapters(model)] for model in (own, one))

    assert len({id(layer.lora_c) for layer in together}) == 1
    assert len({id(layer.lora_log_width) for layer in together}) == len(together)
    torch.testing.assert_close(together[0].lora_c.grad, torch.stack([layer.lora_c.grad for layer in apart]).sum(0))
    torch.testing.assert_close([layer.lora_A.grad for layer in together], [layer.lora_A.grad for layer in apart])
    assert trainable_parameter_counts(own)[0] - trainable_parameter_counts(one)[0] == 8 * (len(apart) - 1)


def test_folder_of_one_set_is_read_as_one_and_that_of_many_is_not(tmp_path: Path) -> None:
    for share in ("model", "layer"):
        model = perturb(adapted("lr_lora", share=share))
        save_adapter(model, config_for("lr_lora", share=share), tmp_path / share, "base")
        config = adapter_config_from_peft(tmp_path / share)
        assert isinstance(config, LRLoRAConfig) and config.share == share
        loaded = llama()
        inject_adapters(loaded, config)
        load_adapter(loaded, tmp_path / share)
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
        assert len({id(layer.lora_c) for _, layer in adapters(loaded)}) == (1 if share == "model" else 14)

    with pytest.raises(AdapterFileError, match="are one tensor in this model: load it with adapter.share=layer"):
        load_adapter(adapted("lr_lora", share="model"), tmp_path / "layer")


def test_no_dense_change_is_kept_or_formed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor made, forward and backward, is a slice of 16 rows of 64 x 128 elements."""
    monkeypatch.setattr(sinc, "ELEMENTS_AT_ONCE", 16 * 128)
    layer = perturb(wrapped(LRLoRALinear, nn.Linear(128, 64).requires_grad_(False)))
    seen: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            views = {"t", "view", "detach", "expand", "_unsafe_view", "alias", "slice"}
            if isinstance(output, Tensor) and func._overloadpacket._qualified_op_name.split("::")[1] not in views:
                seen.append(output.numel())
            return output

    with Watch():
        layer(torch.randn(2, 128)).square().sum().backward()

    assert max(seen) == 16 * 128


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 1}, "adapter.nodes=1: must be at least 2"),
        ({"reach": 0.0}, "adapter.reach=0.0: must be above 0"),
        ({"dropout": 1.0}, r"adapter.dropout=1.0: must be in \[0, 1\)"),
        ({"share": "block"}, "adapter.share=block: must be layer or model"),
    ],
)
def test_bad_option_is_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_for("lr_lora", **options)
