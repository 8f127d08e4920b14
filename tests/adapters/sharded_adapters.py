"""Train adapters on a sharded model as on a whole one, started on two gloo ranks."""

import sys

import torch
import torch.distributed as dist
from adapter_models import WRAPPING, adapted, config_for, perturb, tokens
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_peft.adapters.inject import step_schedule
from lightning_peft.distributed import disconnect
from lightning_peft.training.strategies import sharding_codes


def train(model: nn.Module, method: str, steps: int = 4) -> dict[str, torch.Tensor]:
    """Train a few steps on the same batch on every rank; return the trainable tensors, whole."""
    options = {"warmup_share": 0.0, "final_share": 0.25, "every_n_steps": 1} if method == "adalora" else {}
    schedule = step_schedule(model, config_for(method, **options), steps)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.05)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.after_step(step)
    return {n: p.full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in trained.items()}


def main(quantized: bool) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for method in WRAPPING:
        whole = train(perturb(adapted(method, quantized=quantized)), method)
        model = perturb(adapted(method, quantized=quantized))
        with sharding_codes():
            for block in model.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        sharded = train(model, method)
        for name, tensor in whole.items():
            torch.testing.assert_close(sharded[name], tensor, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        if method == "adalora":
            cut = sum(int((t == 0).sum()) for n, t in sharded.items() if n.endswith("lora_E"))
            assert cut == 14 * 2, cut
        if dist.get_rank() == 0:
            print(method, "equal", flush=True)
    disconnect()


if __name__ == "__main__":
    main(quantized=sys.argv[1] == "nf4")
