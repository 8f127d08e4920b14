"""Two models of several around one sliced base, on every rank: their logits, and where their weights are."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import OffloadPolicy
from torch.distributed.tensor import DTensor

from lightning_peft import distributed
from lightning_peft.adapters.inject import Injection
from lightning_peft.adapters.lora import LoRAConfig
from lightning_peft.models.loading import load_by_block, load_model
from lightning_peft.models.source import ModelConfig
from lightning_peft.objectives.sft import SupervisedLoss
from lightning_peft.quantization.config import Kind, QuantizationConfig
from lightning_peft.training.sliced_base import SlicedBase
from lightning_peft.training.strategies import shard_block, shard_root


class Logits(SupervisedLoss):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        found: torch.Tensor = self.model(ids).logits
        return found


def found_with(name: str, kind: Kind) -> dict[str, Any]:
    model, quantization = ModelConfig(name=name), QuantizationConfig(kind=kind)
    ids = torch.arange(3, 13)[None]
    mesh = init_device_mesh("cpu", (distributed.world_size(),))
    base = SlicedBase(*load_by_block(model, torch.float32, quantization), mesh)
    expected = load_model(model, torch.float32, quantization)(ids).logits
    places, difference = [], 0.0
    for rank in (4, 3):
        own, blocks = base.model(torch.device("cpu"))
        torch.manual_seed(0)
        injection = Injection(own, LoRAConfig(rank=rank))
        for block in blocks:
            injection.adapt(block)
            shard_block(own.get_submodule(block), mesh, OffloadPolicy())
        loss = Logits(own)
        shard_root(loss, mesh, OffloadPolicy())
        base.share(own, loss)
        with torch.no_grad():
            difference = max(difference, float((loss(ids) - expected).abs().max()))
        loss.reshard()  # type: ignore[operator]
        frozen = {n: p for n, p in own.named_parameters() if not p.requires_grad}
        assert all(isinstance(parameter, DTensor) for parameter in frozen.values())
        places.append({name: parameter.to_local().untyped_storage().data_ptr() for name, parameter in frozen.items()})  # type: ignore[operator]
    return {"difference": difference, "parameters": len(places[0]), "is_shared": places[0] == places[1]}


def main(file: str) -> None:
    distributed.connect("cpu")
    kinds = (Kind.none, Kind.nf4)
    found = distributed.of_all([found_with(name, kind) for name in ("tiny", "tiny_tied") for kind in kinds])
    if distributed.rank() == 0:
        Path(file).write_text(json.dumps(found))
    distributed.disconnect()


if __name__ == "__main__":
    with torch.no_grad():
        main(sys.argv[1])
