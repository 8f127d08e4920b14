"""AdaLoRA: LoRA in SVD form whose ranks are cut during training (Zhang et al. 2023, arXiv:2303.10512)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter, AdapterConfig, LowRank, Target
from lightning_peft.adapters.method import Contract, Method, PeftSpelling, Shapes, linears
from lightning_peft.quantization.weights import linear_shape


@dataclass
class AdaLoRAConfig(AdapterConfig):
    method: str = "adalora"
    rank: int | None = 12
    """Rank of every layer at the start."""
    target_rank: int = 8
    """Mean rank at the end."""
    dropout: float = 0.0
    """Probability of dropping an input of A."""
    warmup_share: float = 0.1
    """Share of the optimiser steps before ranks are cut."""
    final_share: float = 0.3
    """Share of the optimiser steps at the end with ranks fixed."""
    every_n_steps: int = 10
    """Optimiser steps between two cuts."""
    beta1: float = 0.85
    """Smoothing of the sensitivities."""
    beta2: float = 0.85
    """Smoothing of their uncertainty."""
    orthogonality: float = 0.5
    """Weight of the penalty that keeps the columns of A and B orthonormal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapter.dropout={self.dropout}: must be in [0, 1)")
        if self.target_rank < 1 or (self.rank is not None and self.target_rank > self.rank):
            raise ValueError(f"adapter.target_rank={self.target_rank}: must be from 1 to adapter.rank={self.rank}")
        for name in ("warmup_share", "final_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"adapter.{name}={getattr(self, name)}: must be in [0, 1)")
        if self.warmup_share + self.final_share >= 1:
            raise ValueError(
                f"adapter.warmup_share={self.warmup_share} and final_share={self.final_share} leave no steps for cuts"
            )
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"adapter.{name}={getattr(self, name)}: must be in (0, 1)")
        if self.every_n_steps < 1:
            raise ValueError(f"adapter.every_n_steps={self.every_n_steps}: must be at least 1")
        if not self.orthogonality >= 0:
            raise ValueError(f"adapter.orthogonality={self.orthogonality}: must be 0 or more")


class AdaLoRALinear(Adapter):
    """y = W x + scaling * B (E * (A x)),  scaling = alpha / rank   (eq. 3).

    `lora_A` (rank, in_features) and `lora_B` (out_features, rank) start normal with deviation 0.02, `lora_E` (rank, 1)
    zero; all fp32. A cut sets entries of E to zero; `rank` in the scaling stays the first one.
    """

    def __init__(self, base_layer: nn.Module, target: Target, config: AdaLoRAConfig):
        super().__init__(base_layer)
        assert target.rank is not None and target.alpha is not None
        out_features, in_features = linear_shape(base_layer)
        device = next(base_layer.parameters()).device
        self.rank = rank = target.rank
        # HF adds 1e-5 to the rank; so do we, to give the same numbers.
        self.scaling = target.alpha / (rank + 1e-5)
        self.dropout = config.dropout
        self.orthogonality = config.orthogonality
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=torch.float32))
        self.lora_E = nn.Parameter(torch.empty(rank, 1, device=device, dtype=torch.float32))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.lora_A, std=0.02)
        nn.init.normal_(self.lora_B, std=0.02)
        nn.init.zeros_(self.lora_E)

    def adapt(self, x: Tensor, base_output: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout, self.training).to(base_output.dtype)
        A, E, B = (factor.to(dropped.dtype) for factor in (self.lora_A, self.lora_E, self.lora_B))
        return base_output + self.scaling * (E.t() * (dropped @ A.t()) @ B.t())

    def product(self) -> tuple[Tensor, Tensor]:
        return self.lora_E * self.lora_A, self.lora_B

    def delta_weight(self) -> Tensor:
        return self.scaling * (self.lora_B.float() @ (self.lora_E * self.lora_A).float())

    def low_rank(self) -> LowRank:
        """Return the triplets that were not cut; one of them, which is zero, where all were."""
        A, B, E = (part.detach().float() for part in (self.lora_A, self.lora_B, self.lora_E))
        kept = (E != 0).flatten()
        kept[0] |= not kept.any()
        return LowRank((E * A)[kept], B[:, kept], self.scaling)

    def schedule_state(self) -> list[Tensor]:
        """Return every weight that may be cut twice: its sensitivity, and how uncertain that is."""
        return [self.lora_A, self.lora_B, self.lora_E] * 2

    def regularization(self) -> Tensor:
        """Return the penalty's weight times the mean of ||A A^T - I|| and ||B^T B - I||   (eq. 4).

        The norm is not squared, as in the authors' code.
        """
        eye = torch.eye(self.rank, device=self.lora_A.device, dtype=self.lora_A.dtype)
        grams = (self.lora_A @ self.lora_A.t(), self.lora_B.t() @ self.lora_B)
        gaps = [torch.linalg.matrix_norm(gram - eye) for gram in grams]
        return self.orthogonality * (gaps[0] + gaps[1]) / 2


class RankSchedule:
    """Cuts the ranks of a model's AdaLoRA layers to a budget that falls with the cube of the steps left   (Alg. 1).

    Call `after_step` after every optimiser step, while the gradients are there. All ranks of a distributed run that
    see the same gradients cut the same entries; sharded ones are gathered.
    """

    def __init__(self, layers: dict[str, AdaLoRALinear], config: AdaLoRAConfig, total_steps: int):
        self.layers = layers
        self.config = config
        self.total_steps = total_steps
        self.first_cut = round(config.warmup_share * total_steps)
        self.last_cut = max(1, total_steps - round(config.final_share * total_steps))
        self.initial_budget = sum(layer.rank for layer in layers.values())
        self.final_budget = config.target_rank * len(layers)
        self.sensitivity: dict[str, Tensor] = {}
        self.uncertainty: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}

    def budget(self, step: int) -> int:
        """Return the entries of E left over all layers after `step` optimiser steps (eq. 12)."""
        if step >= self.last_cut:
            return self.final_budget
        if step <= self.first_cut:
            return self.initial_budget
        left = 1 - (step - self.first_cut) / (self.last_cut - self.first_cut)
        return int(self.final_budget + (self.initial_budget - self.final_budget) * left**3)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Follow the gradients of optimiser step `step` (from 1) and cut when it is time."""
        if step < self.last_cut or (step == self.last_cut and not self.sensitivity):  # the very first step may cut
            self._measure()
        if step == self.last_cut or (self.first_cut < step < self.last_cut and step % self.config.every_n_steps == 0):
            self._cut(self.budget(step))
        if step > self.last_cut:
            # The ranks are fixed: what was cut stays zero, against the optimiser's momentum.
            self._mask()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty, "kept": self.kept}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        # A checkpoint is read into host memory.
        self.sensitivity = {key: value.to(self._device(key)) for key, value in state["sensitivity"].items()}
        self.uncertainty = {key: value.to(self._device(key)) for key, value in state["uncertainty"].items()}
        self.kept = {name: value.to(self._device(f"{name}.lora_E")) for name, value in state["kept"].items()}

    def _device(self, key: str) -> torch.device:
        """Return where the layer of a key such as layers.0.q_proj.lora_A is."""
        return self.layers[key.rpartition(".")[0]].lora_E.device

    def _measure(self) -> None:
        """Smooth |w dL/dw| and its change for every weight   (eqs. 8-10)."""
        beta1, beta2 = self.config.beta1, self.config.beta2
        for name, layer in self.layers.items():
            for part in ("lora_A", "lora_B", "lora_E"):
                parameter = getattr(layer, part)
                # The gradient is None where the layer took no part, as a vision tower's in text: it matters least of
                # all.
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                key = f"{name}.{part}"
                now = gathered(parameter * gradient).abs()
                mean = self.sensitivity.setdefault(key, torch.zeros_like(now))
                mean.mul_(beta1).add_(now, alpha=1 - beta1)
                spread = self.uncertainty.setdefault(key, torch.zeros_like(now))
                spread.mul_(beta2).add_((now - mean).abs(), alpha=1 - beta2)

    def _cut(self, budget: int) -> None:
        """Keep the `budget` triplets with the highest scores over all layers   (eq. 7)."""
        scores = {name: self._scores(name) for name in self.layers}
        cut = self.initial_budget - budget
        if cut == 0:
            return
        threshold = torch.cat(list(scores.values())).kthvalue(cut).values
        self.kept = {name: score > threshold for name, score in scores.items()}
        self._mask()

    def _scores(self, name: str) -> Tensor:
        score = {
            part: self.sensitivity[f"{name}.{part}"] * self.uncertainty[f"{name}.{part}"]
            for part in ("lora_A", "lora_B", "lora_E")
        }
        return score["lora_E"].flatten() + score["lora_A"].mean(1) + score["lora_B"].mean(0)

    def _mask(self) -> None:
        from torch.distributed.tensor import DTensor, distribute_tensor

        for name, kept in self.kept.items():
            E = self.layers[name].lora_E
            mask = kept[:, None].to(E.dtype)
            if not isinstance(E, DTensor):
                E.mul_(mask.to(E.device))
                continue
            mask = distribute_tensor(mask, E.device_mesh, E.placements).to_local()
            own_slice = E.to_local()  # an offloaded slice is not on the mesh's device
            own_slice.mul_(mask.to(own_slice.device))


def gathered(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be sharded."""
    # This import takes half a second, which naming the methods there are should not cost.
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rank_schedule(adapters: dict[str, Adapter], config: AdaLoRAConfig, total_steps: int) -> RankSchedule:
    """Return the rank schedule of a model's AdaLoRA layers."""
    return RankSchedule(
        {n: layer for n, layer in adapters.items() if isinstance(layer, AdaLoRALinear)}, config, total_steps
    )


def read_rank_budget(words: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Read the target of the mean: HF stores the ranks left after the cuts, which may be below it."""
    ranks = [shape[0] for shape in shapes.values()]
    return {"target_rank": min(words.get("target_r", 8), max(set(ranks), key=ranks.count))}


METHOD = Method(
    AdaLoRAConfig,
    linears(AdaLoRALinear),
    trained=("lora_A", "lora_B", "lora_E"),
    change="s B diag(E) A, ranks pruned to a budget",
    paper="arXiv:2303.10512",
    count="r (d + k) + r",
    schedule=rank_schedule,
    cannot_shard="its penalty reads whole matrices outside the forward pass, where they are sharded",
    peft=PeftSpelling(
        "ADALORA",
        ("lora_A", "lora_B", "lora_E"),
        {
            "dropout": "lora_dropout",
            "every_n_steps": "deltaT",
            "beta1": "beta1",
            "beta2": "beta2",
            "orthogonality": "orth_reg_weight",
            "target_rank": "target_r",
        },
        # PEFT refuses to load a config without a number of steps; it means nothing once training is over.
        constants={"init_lora_weights": True, "bias": "none", "total_step": 1, "tinit": 0, "tfinal": 0},
        rank_word="init_r",
        alpha_word="lora_alpha",
        rank_offset=1e-5,
        read_more=read_rank_budget,
    ),
    contract=Contract(options={"target_rank": 2}, trained=lambda t: t.rank * (t.out_features + t.in_features) + t.rank),
)
