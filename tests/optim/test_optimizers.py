import io
import logging
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.optim.optimizers import OPTIMIZERS, OptimizerConfig, build_optimizer, optimizer_state_bytes

PLAIN = [name for name, choice in OPTIMIZERS.items() if choice.config is OptimizerConfig]
"""Optimisers that step any parameter; the one that chooses between experts is held by test_routed_adamw."""
SHAPES = [(16, 576), (192, 16), (500, 300), (576,)]
"""Sizes that are 8-bit, too small for 8 bits, large enough for pages, not decayed."""


def build(name: str, device: str = "cpu") -> tuple[list[nn.Parameter], Optimizer]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in SHAPES]
    config = OptimizerConfig(name=name, lr=1e-2, weight_decay=0.1, beta2=0.99)
    return parameters, build_optimizer([(f"layer{i}", p) for i, p in enumerate(parameters)], config)


def train(parameters: list[nn.Parameter], optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        optimizer.step()


def resumed(name: str, parameters: list[nn.Parameter], optimizer: Optimizer) -> tuple[list[nn.Parameter], Optimizer]:
    """Return new objects holding the same state, through a file."""
    file = io.BytesIO()
    torch.save({"weights": [p.detach() for p in parameters], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh, new_optimizer = build(name, str(parameters[0].device))
    with torch.no_grad():
        for parameter, weight in zip(fresh, saved["weights"], strict=True):
            parameter.copy_(weight)
    new_optimizer.load_state_dict(saved["optimizer"])
    return fresh, new_optimizer


@pytest.mark.parametrize("name", PLAIN)
def test_resume_continues_bit_for_bit(name):
    straight, optimizer = build(name)
    train(straight, optimizer, range(6))
    first, optimizer = build(name)
    train(first, optimizer, range(3))
    second, optimizer = resumed(name, first, optimizer)
    train(second, optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight, second, strict=True))
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("name", PLAIN)
def test_steps_follow_the_formula_of_adamw(name):
    # arXiv:1711.05101, algorithm 2, in fp64 with decoupled decay lr * weight_decay.
    parameters, optimizer = build(name)
    start = [parameter.detach().double().clone() for parameter in parameters]
    expected = [weight.clone() for weight in start]
    means, squares = ([torch.zeros_like(weight) for weight in start] for _ in range(2))
    train(parameters, optimizer, range(4))
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for i, weight in enumerate(expected):
            grad = torch.randn(weight.shape, generator=generator).double()
            means[i] = 0.9 * means[i] + 0.1 * grad
            squares[i] = 0.99 * squares[i] + 0.01 * grad**2
            mean, square = means[i] / (1 - 0.9 ** (step + 1)), squares[i] / (1 - 0.99 ** (step + 1))
            weight.mul_(1 - 1e-2 * (0.1 if weight.ndim == 2 else 0)).sub_(1e-2 * mean / (square.sqrt() + 1e-8))
    # 8-bit states are off by up to a few per cent of the block's largest value; fp32 rounding otherwise.
    relative = 0.1 if OPTIMIZERS[name].state_bits == 8 else 1e-4
    for parameter, weight, origin in zip(parameters, expected, start, strict=True):
        assert (parameter.double() - weight).norm() < relative * (weight - origin).norm()


def test_8bit_states_are_bytes_from_4096_elements_on():
    parameters, optimizer = build("adamw_8bit")
    train(parameters, optimizer, range(1))
    states = [optimizer.state[parameter]["state1"].dtype for parameter in parameters]
    assert states == [torch.uint8, torch.float32, torch.uint8, torch.float32]


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_state_bytes_are_those_of_the_states(name):
    parameters, optimizer = build(name)
    train(parameters, optimizer, range(1))
    actual = sum(
        tensor.nbytes
        for parameter in parameters
        for key, tensor in optimizer.state[parameter].items()
        if isinstance(tensor, Tensor) and not key.startswith("qmap")  # one shared kilobyte each
    )
    assert sum(optimizer_state_bytes([parameter.numel() for parameter in parameters], name)) == actual


def test_small_tensors_are_not_paged():
    # bitsandbytes' limit is 1e5 elements: A of rank 16 on a width of 4096 stays, rank 32 goes.
    assert optimizer_state_bytes([16 * 4096], "paged_adamw_32bit") == (0, 16 * 4096 * 8)
    assert optimizer_state_bytes([32 * 4096], "paged_adamw_32bit") == (32 * 4096 * 8, 0)
    assert optimizer_state_bytes([32 * 4096], "paged_adamw_8bit") == (32 * 4096 * 2, 32 * 4096 // 256 * 8)
    assert optimizer_state_bytes([32 * 4096], "adamw") == (0, 32 * 4096 * 8)


@pytest.mark.parametrize("name", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_cpu_says_once_that_nothing_is_paged(name, caplog, recwarn):
    caplog.set_level(logging.INFO, logger="lightning_peft")
    parameters, optimizer = build(name)
    train(parameters, optimizer, range(2))
    assert [record.getMessage() for record in caplog.records] == [
        f"optimizer={name}: there is no paging without CUDA, the states stay in ordinary memory"
    ]
    assert not recwarn.list


def test_lora_plus_reaches_every_optimiser():
    for name in PLAIN:
        parameter = nn.Parameter(torch.zeros(8, 8))
        config = OptimizerConfig(name=name, lr=1e-4, lora_plus_ratio=16)
        assert build_optimizer([("q.lora_B.weight", parameter)], config).param_groups[0]["lr"] == pytest.approx(1.6e-3)


def test_option_files_are_the_table():
    files = {path.stem: yaml.safe_load(path.read_text()) for path in Path("conf/optimizer").glob("*.yaml")}
    assert files.keys() == OPTIMIZERS.keys()
    assert all(file["defaults"] == [f"{name}_schema"] and file["name"] == name for name, file in files.items())


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="no parameter requires gradients"):
        build_optimizer([("frozen", nn.Parameter(torch.zeros(2, 2), requires_grad=False))], OptimizerConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adam"}, "optimizer.name=adam: unknown, choose one of adamw, adamw_8bit"),
        ({"lr": 0.0}, "optimizer.lr=0.0: must be above 0"),
        ({"eps": -1e-8}, "optimizer.eps=-1e-08: must be above 0"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay=-0.1: must be at least 0"),
        ({"beta2": 1.0}, "optimizer.beta2=1.0: must be at least 0 and below 1"),
        ({"lora_plus_ratio": 0.5}, "optimizer.lora_plus_ratio=0.5: must be at least 1, or null"),
    ],
)
def test_config_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**options)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_states_stay_paged_after_resume(name):
    first, optimizer = build(name, "cuda")
    train(first, optimizer, range(3))
    second, resumed_optimizer = resumed(name, first, optimizer)
    paged = [getattr(resumed_optimizer.state[p]["state1"], "is_paged", False) for p in second]
    assert paged == [parameter.numel() >= 100_000 for parameter in second] == [False, False, True, False]
    train(first, optimizer, range(3, 6))
    train(second, resumed_optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
