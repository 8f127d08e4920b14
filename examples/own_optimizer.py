"""An initialisation and an optimiser of one's own: small orthonormal rows for A, and SGD with momentum.

    lightning-peft train imports=[own_optimizer] adapter.init=orthonormal optimizer=sgd optimizer.lr=0.1 model=tiny

Run it where this file lies, or with its folder on PYTHONPATH.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_peft.adapters.initialization import INITS, Initialization, Start
from lightning_peft.optim.optimizers import OPTIMIZERS, OptimizerChoice, OptimizerConfig


@dataclass
class SGDConfig(OptimizerConfig):
    name: str = "sgd"
    momentum: float = 0.9
    """Share of the last step that the next one keeps."""


def sgd(groups: list[dict[str, Any]], config: OptimizerConfig) -> Optimizer:
    assert isinstance(config, SGDConfig)
    return SGD(groups, lr=config.lr, momentum=config.momentum)


def orthonormal(weight: Tensor, rank: int, scaling: float) -> Start:
    """Return A with orthonormal rows of a tenth of length, and no B, which starts at zero."""
    rows = torch.randn(weight.shape[1], rank, device=weight.device)
    return Start(torch.linalg.qr(rows).Q.t() / 10)


INITS["orthonormal"] = Initialization(orthonormal, is_neutral=True)
OPTIMIZERS["sgd"] = OptimizerChoice(sgd, config=SGDConfig)
