import tempfile

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lightning_peft.distributed import disconnect
from lightning_peft.quantization.linear import QuantizedLinear
from lightning_peft.quantization.quantize import weights_fingerprint
from lightning_peft.training.strategies import sharding_codes


class Block(nn.Module):
    def __init__(self, double_quantization: bool, seed: int):
        super().__init__()
        weight = torch.randn(30, 64, generator=torch.Generator().manual_seed(seed))
        self.frozen = QuantizedLinear.from_weight(weight, double_quantization=double_quantization)
        self.trained = nn.Linear(30, 64, bias=False)
        with torch.no_grad():
            self.trained.weight.copy_(weight.t())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.trained(self.frozen(x))


def output_and_gradient(model: nn.Module) -> tuple[Tensor, Tensor]:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(5)).requires_grad_()
    output = model(x)
    output.square().sum().backward()
    assert x.grad is not None
    return output, x.grad


def compare(rank: int, folder: str, double_quantization: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    whole, sharded = (nn.Sequential(*(Block(double_quantization, seed) for seed in (0, 1))) for _ in range(2))
    expected_hash = weights_fingerprint(whole)
    with sharding_codes():
        for block in sharded:
            fully_shard(block)
        fully_shard(sharded)
    assert sharded[0].frozen.weight.to_local().shape == (15, 32)
    assert weights_fingerprint(sharded) == expected_hash
    for ours, theirs in zip(output_and_gradient(sharded), output_and_gradient(whole), strict=True):
        assert torch.equal(ours, theirs)
    assert weights_fingerprint(sharded) == expected_hash
    disconnect()


@pytest.mark.multi_process
@pytest.mark.parametrize("double_quantization", [True, False])
def test_rows_sharded_over_two_ranks_compute_the_same_bits(double_quantization):
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(compare, (folder, double_quantization), nprocs=2)
