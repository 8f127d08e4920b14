"""A frozen base of which each rank holds one slice, for the models of several runs, each sharded by itself."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import OffloadPolicy
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel

from lightning_peft.compat import give_slices
from lightning_peft.models.blocks import block_names
from lightning_peft.models.twin import copy_around_same_tensors
from lightning_peft.training.strategies import shard_block, shard_root
from lightning_peft.training.whole_adapters import rows_of_a_rank


class SlicedBase:
    """Slices of a base's weights, and models around them.

    A model of a lone run is given whole weights block by block, and FSDP cuts a slice of each. A model made here is
    filled alike, with what the ranks gather; afterwards `share` puts the slices that all models have in the place of
    its own.
    """

    def __init__(self, model: PreTrainedModel, blocks: Iterator[str], mesh: DeviceMesh):
        """Take a model as `load_by_block` gives it; of one that is read block by block, one is whole at a time."""
        self.mesh = mesh
        self.template = model
        """The modules and buffers of the base; its parameters are on the meta device."""
        self.slices: dict[str, nn.Parameter] = {}
        """Slices by the parameter's name; those of tied weights are one."""
        self.padded: dict[nn.Parameter, Tensor] = {}
        """Slices that are smaller than the first rank's, with the rows that are missing, as FSDP sends them."""
        self._cut()
        for _ in blocks:
            self._cut()

    def _cut(self) -> None:
        """Keep slices of the parameters that are filled."""
        filled = [(n, p) for n, p in self.template.named_parameters(remove_duplicate=False) if not p.is_meta]
        cut: dict[nn.Parameter, tuple[nn.Parameter, nn.Parameter]] = {}
        for name, parameter in filled:
            if parameter not in cut:
                # Every rank has read the whole, so that each cuts its own and nothing is sent.
                own = distribute_tensor(parameter.data, self.mesh, [Shard(0)], src_data_rank=None)
                cut[parameter] = self._with_room(own), frozen(parameter.data.to("meta"))
            self.slices[name], empty = cut[parameter]
            put_parameter(self.template, name, empty)

    def _with_room(self, own: DTensor) -> nn.Parameter:
        """Return a slice as a parameter; where it is smaller than the first rank's, in memory that has room for those.

        FSDP would make such memory for each model.
        """
        rows = own.to_local()
        missing = rows_of_a_rank(own) - len(rows)
        if not missing:
            return frozen(own)
        padded = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
        held = DTensor.from_local(
            padded[: len(rows)], self.mesh, [Shard(0)], run_check=False, shape=own.shape, stride=own.stride()
        )
        parameter = frozen(held)
        self.padded[parameter] = padded
        return parameter

    def model(self, device: torch.device) -> tuple[PreTrainedModel, Iterator[str]]:
        """Return a new model as `load_by_block` does: its blocks are gathered one at a time."""
        model = copy_around_same_tensors(self.template)
        blocks = block_names(model)
        inside = tuple(f"{block}." for block in blocks)

        def fill(names: list[str]) -> None:
            whole: dict[nn.Parameter, nn.Parameter] = {}
            for name in names:
                if (own := self.slices[name]) not in whole:
                    assert isinstance(own, DTensor)
                    whole[own] = frozen(own.full_tensor().to(device))
                put_parameter(model, name, whole[own])

        def filled() -> Iterator[str]:
            for block in blocks:
                fill([name for name in self.slices if name.startswith(f"{block}.")])
                yield block

        fill([name for name in self.slices if not name.startswith(inside)])
        return model, filled()

    def shard(self, model: PreTrainedModel, root: nn.Module) -> None:
        """Shard a copy of the template, and `root` that holds it, around the slices that all have."""
        for block in block_names(model):
            shard_block(model.get_submodule(block), self.mesh, OffloadPolicy())
        shard_root(root, self.mesh, OffloadPolicy())
        self.share(model, root)

    def share(self, model: nn.Module, root: nn.Module) -> None:
        """Give a sharded model in its root, before its first forward, the slices of the base that all have."""
        for name, _ in list(model.named_parameters(remove_duplicate=False)):
            # What stands around a layer has it as its base_layer.
            if (own := self.slices.get(name.replace(".base_layer.", "."))) is not None:
                put_parameter(model, name, own)
        give_slices(root, self.padded)


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def put_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Make this the parameter of that name, whatever keeps the present one."""
    module, _, leaf = name.rpartition(".")
    model.get_submodule(module)._parameters[leaf] = parameter
