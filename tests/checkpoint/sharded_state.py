"""Adapters and trainable state of a model sharded by FSDP2, saved in FOLDER; started on two gloo ranks."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_peft.adapters.base import AdapterConfig
from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.checkpoint.peft_format import save_adapter
from lightning_peft.checkpoint.resume import load_trainable_state, trainable_state_dict
from lightning_peft.distributed import disconnect
from lightning_peft.models.tiny import tiny_model

CONFIGS: list[AdapterConfig] = [
    # Rank 3 does not divide by two ranks: the shards are uneven.
    LoRAConfig(rank=3, trainable_modules=["norm"]),
    LoRAConfig(rank=4, init="pissa"),
]


def adapted(config: AdapterConfig, seed: int) -> torch.nn.Module:
    model = tiny_model()
    torch.manual_seed(seed)
    inject_adapters(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def shard(model: torch.nn.Module) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def check_rank(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for number, config in enumerate(CONFIGS):
        whole = adapted(config, seed=1)
        expected = {name: tensor.clone() for name, tensor in trainable_state_dict(whole).items()}
        model = adapted(config, seed=2)
        shard(model)
        assert any(isinstance(p, DTensor) for p in model.parameters() if p.requires_grad)

        load_trainable_state(model, expected)
        got = trainable_state_dict(model)
        assert got.keys() == (expected.keys() if rank == 0 else set())
        assert all(torch.equal(got[name], expected[name]) for name in got)

        save_adapter(model, config, folder / f"sharded{number}")
        dist.barrier()
        if rank == 0:
            save_adapter(whole, config, folder / f"whole{number}")
    disconnect()


if __name__ == "__main__":
    check_rank(Path(sys.argv[1]))
