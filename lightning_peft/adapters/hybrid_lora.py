"""Hybrid-LoRA: the modules that lose most by a low rank are trained in full, the others as LoRA (Zhang et al. 2026).

The paper (arXiv:2605.18822) ranks modules by a score whose formula was not found. The scores here are ours: what of the
mean gradient lies outside its best rank-r approximation, and three to compare that with.
"""

import logging
import random
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from lightning_peft.adapters.base import AdapterConfig, Target
from lightning_peft.adapters.lora import PEFT, LoRAConfig, LoRALinear
from lightning_peft.adapters.method import Contract, Method, Selection, linears, only_written
from lightning_peft.adapters.targets import find_targets
from lightning_peft.distributed import on_rank_zero, reduce_sums

logger = logging.getLogger(__name__)

SHOWN = 8
"""Modules behind the chosen ones that the table shows."""


@dataclass
class HybridLoRAConfig(LoRAConfig):
    method: str = "hybrid_lora"
    score: str = "residual_energy"
    """Score that ranks the modules: residual_energy, preconditioned, grad_norm or random. All are reconstructions or
    baselines of ours, as the paper's formula was not found."""
    budget: float = 0.1
    """Share of the candidates that is trained in full; the paper has 10 % of the modules."""
    budget_in: str = "parameters"
    """Unit of the share: parameters, where modules are ranked by their score for a parameter, or modules."""
    probe_batches: int = 4
    """Micro batches whose mean gradient is looked at."""
    draw_seed: int = 0
    """Seed of score=random: other modules for another one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in SCORES:
            raise ValueError(f"adapter.score={self.score}: must be one of {', '.join(SCORES)}")
        if not 0 < self.budget < 1:
            raise ValueError(f"adapter.budget={self.budget}: must be above 0 and below 1")
        if self.budget_in not in ("parameters", "modules"):
            raise ValueError(f"adapter.budget_in={self.budget_in}: must be parameters or modules")
        if self.probe_batches < 1:
            raise ValueError(f"adapter.probe_batches={self.probe_batches}: must be at least 1")
        if self.initialization.rewrites_base:
            raise ValueError(f"adapter.init={self.init}: rewrites a base that is trained in part; use kaiming")


@dataclass
class Gradients:
    """Sums over micro batches for one module, fp32 and in host memory."""

    total: Tensor
    """(out_features, in_features)."""
    squares: Tensor | None = None
    """Squares of the sums of each batch, where the score asks for them."""


def residual_energy(gradient: Tensor, rank: int) -> float:
    """Return sum_{i > r} sigma_i^2 of a matrix, by a randomised SVD with eight directions more and two iterations.

    To first order, a step along the gradient lowers the loss by its whole energy, and one of rank r by the first r.
    """
    most = min(rank + 8, *gradient.shape)
    if rank >= min(gradient.shape):
        return 0.0
    generator = torch.Generator().manual_seed(0)
    basis = gradient @ torch.randn(gradient.shape[1], most, generator=generator, dtype=gradient.dtype)
    for _ in range(2):
        basis = gradient @ (gradient.t() @ torch.linalg.qr(basis).Q)
    values = torch.linalg.svdvals(torch.linalg.qr(basis).Q.t() @ gradient)[:rank]
    return max(0.0, float(gradient.double().square().sum() - values.double().square().sum()))


def score_of(config: HybridLoRAConfig, target: Target, found: Gradients, batches: int) -> float:
    """Return the score of a module from the sums of its gradients over so many micro batches."""
    mean = found.total / batches
    if config.score == "random":
        return random.Random(f"{config.draw_seed} {target.name}").random()
    if config.score == "grad_norm":
        return float(mean.double().square().sum())
    if config.score == "preconditioned":
        assert found.squares is not None
        mean = mean / ((found.squares / batches).sqrt() + 1e-8)
    assert target.rank is not None
    return residual_energy(mean, target.rank)


SCORES = ("residual_energy", "preconditioned", "grad_norm", "random")


def worth(scores: Mapping[str, float], targets: Iterable[Target], config: HybridLoRAConfig) -> dict[str, float]:
    """Return what modules are ordered by: the score, or with a budget in parameters the score of each that LoRA spares.

    A module that LoRA spares nothing of is no candidate under such a budget.
    """
    if config.budget_in == "modules":
        return dict(scores)
    spared = {
        t.name: t.out_features * t.in_features - (t.rank or 0) * (t.out_features + t.in_features) for t in targets
    }
    return {name: scores[name] / count for name, count in spared.items() if count > 0}


def choose(worth: Mapping[str, float], targets: Iterable[Target], config: HybridLoRAConfig) -> list[str]:
    """Return the modules trained in full, best first: as many of the order by worth as the budget holds.

    Ties go by name, so that all ranks agree. Raises ValueError where the budget does not hold the first.
    """
    sizes = {t.name: t.out_features * t.in_features for t in targets}
    by_module = config.budget_in == "modules"
    costs = {name: 1 if by_module else sizes[name] for name in worth}
    left = config.budget * (len(sizes) if by_module else sum(sizes.values()))
    chosen: list[str] = []
    for name in sorted(worth, key=lambda n: (-worth[n], n)):
        left -= costs[name]
        if left < 0:
            break
        chosen.append(name)
    if not chosen:
        raise ValueError(
            f"adapter.budget={config.budget} adapter.budget_in={config.budget_in}: holds none of {len(sizes)} modules; "
            "raise it, or take more target_modules"
        )
    return chosen


@contextmanager
def watched(model: nn.Module, targets: Iterable[Target], squares: bool) -> Any:
    """Let backward passes add up the gradient of every target's weight, dense or coded, in host memory."""
    sums = {t.name: Gradients(torch.zeros(t.out_features, t.in_features)) for t in targets}
    if squares:
        for found in sums.values():
            found.squares = torch.zeros_like(found.total)

    def after(name: str) -> Callable[..., None]:
        def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach()

            def add(grad: Tensor) -> None:
                rows = grad.reshape(-1, grad.shape[-1]).float().t()
                product = (rows @ x.reshape(-1, x.shape[-1]).float()).cpu()
                sums[name].total += product
                if (own := sums[name].squares) is not None:
                    own += product.square()

            if output.requires_grad:
                output.register_hook(add)

        return watch

    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    hooks = [embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_())]
    hooks += [model.get_submodule(name).register_forward_hook(after(name)) for name in sums]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def select(
    model: nn.Module, config: AdapterConfig, losses: Iterable[Callable[[], Tensor]], device: torch.device
) -> Selection:
    """Probe the base with this rank's losses, one for each micro batch, and choose the modules trained in full.

    The gradients of all ranks are added up on `device`, so all score the same numbers; rank zero's choice counts.
    """
    assert isinstance(config, HybridLoRAConfig)
    targets = find_targets(model, config, tuple(METHOD.layers))
    before = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    batches = 0
    with watched(model, targets, config.score == "preconditioned") as sums, torch.enable_grad():
        for loss in losses:
            loss().backward()
            batches += 1
    for parameter, required in before:
        parameter.requires_grad_(required)
    count = int(reduce_sums(torch.tensor(float(batches), dtype=torch.float64, device=device)))
    scores: dict[str, float] = {}
    for target in targets:
        found = sums.pop(target.name)
        found.total = reduce_sums(found.total.to(device)).cpu()
        if found.squares is not None:
            found.squares = reduce_sums(found.squares.to(device)).cpu()
        scores[target.name] = score_of(config, target, found, count)
    chosen = on_rank_zero(lambda: choose(worth(scores, targets, config), targets, config))
    return Selection(chosen, scores, config.score)


def largest(model: nn.Module, config: AdapterConfig) -> Selection:
    """Return the choice that costs most memory: for an estimate, which sees no data."""
    assert isinstance(config, HybridLoRAConfig)
    targets = find_targets(model, config, tuple(METHOD.layers))
    sizes = {t.name: float(t.out_features * t.in_features) for t in targets}
    return Selection(choose(sizes, targets, config), sizes, "size")


def table_of(selection: Selection) -> Table:
    """Make a table of the chosen modules and of those behind them, with their scores."""
    table = Table("module", selection.score, "trained", title=f"{len(selection.chosen)} modules are trained in full")
    behind = sorted(set(selection.scores) - set(selection.chosen), key=lambda n: (-selection.scores[n], n))
    for name in selection.chosen:
        table.add_row(name, f"{selection.scores[name]:.4g}", "in full")
    for name in behind[:SHOWN]:
        table.add_row(name, f"{selection.scores[name]:.4g}", "as LoRA")
    if len(behind) > SHOWN:
        table.add_row(f"{len(behind) - SHOWN} more", "", "as LoRA")
    return table


METHOD = Method(
    HybridLoRAConfig,
    linears(LoRALinear),
    trained=("lora_A.weight", "lora_B.weight"),
    change="every weight of the modules that a low rank serves worst, s B A elsewhere",
    paper="arXiv:2605.18822",
    reconstruction="the score: the energy of the mean gradient outside its best approximation of rank r",
    count="r (d + k), d k where chosen",
    select=select,
    largest_selection=largest,
    peft=only_written(PEFT),
    contract=Contract(trained=lambda t: t.rank * (t.out_features + t.in_features)),
)
