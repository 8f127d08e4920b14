"""Count the bytes that a forward and backward pass of a sharded model gathers and reduces, on every rank, as JSON."""

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.distributed import disconnect
from lightning_peft.quantization.config import Kind, QuantizationConfig
from lightning_peft.quantization.quantize import quantize_linears, weights_fingerprint
from lightning_peft.training.strategies import sharding_codes


class Traffic(TorchDispatchMode):
    """Bytes of each gather's result and of each reduction's input."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered: list[int] = []
        self.reduced: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.c10d._allgather_base_.default:
            self.gathered.append(args[0].nbytes)
        if function is torch.ops.c10d._reduce_scatter_base_.default:
            self.reduced.append(args[1].nbytes)
        return function(*args, **(kwargs or {}))


def measure(quantized: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4,
        )
    ).bfloat16()  # fmt: skip
    if quantized:
        quantize_linears(model, QuantizationConfig(Kind.nf4))
    inject_adapters(model, LoRAConfig(rank=2))
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    before = weights_fingerprint(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with sharding_codes():
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
    tokens = torch.arange(8)[None]
    with Traffic() as traffic:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    kept = sum(p.grad.to_local().nbytes for p in model.parameters() if p.grad is not None)
    return {
        "gathered": traffic.gathered, "reduced": traffic.reduced, "trained": trained, "gradients": kept,
        "same_weights": weights_fingerprint(model) == before,
    }  # fmt: skip


if __name__ == "__main__":
    dist.init_process_group("gloo")
    measured = {"bf16": measure(quantized=False), "nf4": measure(quantized=True)}
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(measured, file)
    disconnect()
