"""Adapters and trainable state of a model sharded by FSDP2, on two gloo processes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_peft.adapters.base import AdapterConfig
from lightning_peft.adapters.inject import inject_adapters
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.checkpoint.peft_format import adapter_config_from_peft, load_adapter, save_adapter
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


def check_rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
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


@pytest.mark.multi_process
def test_sharded_state_is_gathered_saved_and_restored(tmp_path: Path) -> None:
    mp.start_processes(check_rank, args=(tmp_path,), nprocs=2, start_method="spawn")

    for number in range(len(CONFIGS)):
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            sharded, whole = (tmp_path / f"{kind}{number}" / name for kind in ("sharded", "whole"))
            assert sharded.read_bytes() == whole.read_bytes()
    fresh = tiny_model()
    inject_adapters(fresh, adapter_config_from_peft(tmp_path / "sharded1"))
    load_adapter(fresh, tmp_path / "sharded1")
    input_ids = torch.arange(24)[None]
    expected = adapted(CONFIGS[1], seed=1)(input_ids=input_ids).logits
    torch.testing.assert_close(fresh(input_ids=input_ids).logits, expected, rtol=1e-5, atol=5e-5)
