"""Take training steps on fake tensors that lie on cuda:0, and say what a GPU would have met.

    python steps.py CASES.json     # a list of cases as in test_fake_cuda.py

One JSON line a case: the error, or the operators that make the host wait. Two steps are taken, the second from the
state that a checkpoint keeps, which is read into host memory.
"""

import json
import sys
import warnings
from typing import Any

import benchmarks.fake_cuda  # noqa: F401  before torch

# isort: split

import torch
from host_syncs import makes_the_host_wait, watched_synchronisation
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import lightning_peft.kernels.codes as codes
from lightning_peft.adapters.inject import inject_adapters, regularization, step_schedule
from lightning_peft.adapters.registry import METHODS
from lightning_peft.adapters.shared_input import adapt_together
from lightning_peft.data.batch import Batch
from lightning_peft.estimation.trace import make_fake
from lightning_peft.models.attention import accept_packed_batches
from lightning_peft.models.blocks import decoder_of
from lightning_peft.models.loading import empty_model
from lightning_peft.models.source import ModelConfig
from lightning_peft.objectives.logits import LogitPath
from lightning_peft.objectives.sft import SupervisedLoss
from lightning_peft.optim.bitsandbytes_adamw import BitsandbytesAdamW
from lightning_peft.optim.optimizers import OptimizerConfig, build_optimizer
from lightning_peft.optim.sharded import load_named_state, named_state
from lightning_peft.quantization.config import Kind, QuantizationConfig
from lightning_peft.quantization.quantize import prepare_quantized
from lightning_peft.training.activation_checkpointing import checkpoint_blocks
from lightning_peft.training.config import ActivationCheckpointing
from lightning_peft.training.token_scaling import TokenWindow, divisor, scale_gradients

ROWS, TOKENS = 2, 64


class Waits(TorchDispatchMode):
    """Records every operator that waits for a tensor on the device, and every synchronisation."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_device = any(isinstance(value, Tensor) and value.is_cuda for value in args)
        if on_device and makes_the_host_wait(func, args):
            self.found.append(str(func))
        to = (kwargs or {}).get("device")
        if on_device and func.overloadpacket is torch.ops.aten._to_copy and to == torch.device("cpu"):
            self.found.append("copy to the host")
        return func(*args, **(kwargs or {}))


def on_host(state: Any) -> Any:
    """Return what a checkpoint's state is once it is read."""
    return tree_map(lambda value: value.cpu() if isinstance(value, Tensor) else value, state)


def quantization(kind: str) -> QuantizationConfig:
    if kind == "int8":
        return QuantizationConfig(kind=Kind.int8, block_size=64, double_quantization=False)
    return QuantizationConfig(kind=Kind[kind], block_size=32)


def build(case: dict[str, Any]) -> tuple[SupervisedLoss, Any]:
    """Make the model of a case on the meta device, and the config of its adapters."""
    model = empty_model(ModelConfig("tiny"), torch.bfloat16)
    accept_packed_batches(model)
    if case["kind"] != "none":
        prepare_quantized(model, quantization(case["kind"]))
    method = METHODS[case["method"]]
    options: dict[str, Any] = {"method": case["method"]} | method.contract.options
    if case["head"]:
        options["trainable_modules"] = ["lm_head"]
    if case["dropout"]:
        options["dropout"] = case["dropout"]
    config = method.config(**options)
    inject_adapters(model, config)
    adapt_together(model, decoder_of(model), in_weights=case["inside"])
    objective = SupervisedLoss(model).train()
    checkpoint_blocks(model, ActivationCheckpointing[case["checkpointing"]])
    objective.assume(LogitPath())
    return objective, config


def run(case: dict[str, Any], objective: SupervisedLoss, config: Any, waits: Waits) -> None:
    """Take two steps of a case, the second resumed. Raises what a GPU would have raised."""
    model = objective.model
    make_fake(objective, device="cuda:0")
    table = torch.empty(256, device="cuda:0")
    # Tables that are made from values.
    codes.dynamic_map = codes.levels = lambda *_: table
    BitsandbytesAdamW.fill_qmap = lambda self: self.name2qmap.update(dynamic=table, udynamic=table)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    parameters = [parameter for _, parameter in trained]

    def fresh() -> tuple[Any, Any]:
        return build_optimizer(trained, OptimizerConfig(name=case["optimizer"])), step_schedule(model, config, 100)

    optimizer, schedule = fresh()
    for step in (1, 2):
        if step == 2:
            optimizer_state = named_state(optimizer)
            schedule_state = None if schedule is None else on_host(schedule.state_dict())
            optimizer, schedule = fresh()
            load_named_state(optimizer, optimizer_state)
            if schedule is not None:
                schedule.load_state_dict(schedule_state)
        ids, labels, positions = (torch.empty(ROWS, TOKENS, dtype=torch.int64, device="cuda:0") for _ in range(3))
        samples = torch.empty(ROWS + 2, dtype=torch.int32, device="cuda:0")
        batch = Batch(ids, labels, positions, samples, TOKENS, ROWS * TOKENS, ROWS * (TOKENS - 1))
        with waits, watched_synchronisation(waits.found.append):
            loss = objective(batch)
            window = TokenWindow()
            window.add(loss, objective.loss_weight(batch))
            if (penalty := regularization(model)) is not None:
                loss = loss + penalty
            loss.backward()
            scale_gradients(parameters, 1 / divisor(window.close().weight))
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if schedule is not None:
                schedule.after_step(step)
        for name, parameter in trained:
            assert parameter.grad is None or parameter.grad.dtype == parameter.dtype, name
        optimizer.zero_grad()


def outcome(case: dict[str, Any]) -> dict[str, Any]:
    waits = Waits()
    # A CPU build refuses to synchronise; that it is called is what counts.
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    try:
        objective, config = build(case)
        with FakeTensorMode(allow_non_fake_inputs=True):
            run(case, objective, config, waits)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300], "waits": []}
    return {"error": None, "waits": sorted(set(waits.found))}


def main() -> None:
    warnings.filterwarnings("ignore")
    for case in json.loads(open(sys.argv[1]).read()):
        print(json.dumps(case | outcome(case)), flush=True)


if __name__ == "__main__":
    main()
