"""AdamW that moves one expert of each layer a step, whichever its own moments say would gain most (Tang et al. 2026).

MoLF, arXiv:2605.07111, as in the authors' code: experts of a layer are its base weight and each of its LoRAs. All have
exact gradients, and the moments of all go on; only winners take the step, with its decay.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.distributed import reduce_sums

EXPERT = re.compile(r"(?P<layer>.+)\.(?:lora_[AB]\.(?P<number>\d+)|(?P<base>base_layer)\.[^.]+)")
"""A parameter of an expert, by its name: lora_A.i and lora_B.i of a layer, or its base_layer's weight and bias."""
SCORES = ("epd", "pfn")


class Place(NamedTuple):
    """The place of an expert's score."""

    layer: int
    expert: int


class RoutedAdamW(Optimizer):
    """AdamW with fp32 moments, whose experts compete in each step; parameters of no expert are stepped as AdamW does.

    score: epd, expected decrease (eta / N) sum m^2 / (sqrt(v) + eps), or pfn, sqrt(sum (m / (sqrt(v) + eps))^2 / N),
    from raw moments. `winners` experts of a layer are moved. Call `take_names` once the groups have `param_names`.
    With sharded parameters every rank must call `step`, as the sums go over all shards. Nothing waits for the device.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        score: str = "epd",
        winners: int = 1,
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.score, self.winners = score, winners
        self.layers: list[str] = []
        self.experts: list[list[str]] = []
        """Names of each layer's experts, in the order of their places."""
        self.places: dict[nn.Parameter, Place] = {}
        self.sizes: Tensor = torch.zeros(0)
        """(layers, experts) numbers in each; 0 where a layer has fewer."""
        self.measured: dict[str, Tensor] = {}
        """Share of the layers that the expert of each place has won in the last step, device scalars."""

    def take_names(self) -> None:
        """Find the experts by the names of their parameters. Raises ValueError where no layer has two."""
        found: dict[str, dict[str, list[nn.Parameter]]] = defaultdict(lambda: defaultdict(list))
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if match := EXPERT.fullmatch(name):
                    found[match["layer"]][match["number"] or "base"].append(parameter)
        layers = {layer: experts for layer, experts in found.items() if len(experts) > 1}
        if not layers:
            raise ValueError("optimizer=routed_adamw: no layer has two experts to choose from; use method=molf_e")
        self.layers = list(layers)
        self.experts = [sorted(experts, key=lambda e: -1 if e == "base" else int(e)) for experts in layers.values()]
        most = max(map(len, self.experts))
        if self.winners > most:
            raise ValueError(f"optimizer.winners={self.winners}: a layer has {most} experts")
        self.sizes = torch.zeros(len(layers), most, dtype=torch.float64)
        for layer, (experts, names) in enumerate(zip(layers.values(), self.experts, strict=True)):
            for expert, name in enumerate(names):
                for parameter in experts[name]:
                    self.places[parameter] = Place(layer, expert)
                    self.sizes[layer, expert] += getattr(parameter, "whole", parameter).numel()
        self.param_groups[0].setdefault("wins", torch.zeros_like(self.sizes))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pieces: dict[Place, list[Tensor]] = defaultdict(list)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._follow(parameter, group)
                    if (place := self.places.get(parameter)) is not None:
                        pieces[place].append(self._gain(parameter, group))
        if not pieces:  # a step without gradients is one that is left out
            return loss
        won = self._winners(pieces)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    place = self.places.get(parameter)
                    self._move(parameter, group, None if place is None else won[place.layer, place.expert])
        return loss

    def _follow(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Let the moments of a parameter go on."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        assert parameter.grad is not None
        grad = parameter.grad.float()
        beta1, beta2 = group["betas"]
        state["step"] += 1
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)

    def _gain(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Return a parameter's part of its expert's score, fp64, before it is divided by the expert's size."""
        m, v = self.state[parameter]["exp_avg"], self.state[parameter]["exp_avg_sq"]
        direction = m / (v.sqrt() + group["eps"])
        if self.score == "pfn":
            return direction.square().sum(dtype=torch.float64)
        return group["lr"] * (m * direction).sum(dtype=torch.float64)

    def _winners(self, pieces: dict[Place, list[Tensor]]) -> Tensor:
        """Return which experts win, (layers, experts) of bool, alike on every rank."""
        device = next(iter(pieces.values()))[0].device
        sums = torch.zeros(self.sizes.shape, dtype=torch.float64, device=device)
        rows = [torch.stack(parts).sum() for parts in pieces.values()]
        at = torch.tensor(list(pieces), device=device)
        sums.index_put_((at[:, 0], at[:, 1]), torch.stack(rows))
        if any(hasattr(parameter, "whole") for parameter in self.places):
            sums = reduce_sums(sums)
        sizes = self.sizes.to(device)
        scores = torch.where(sizes > 0, sums / sizes, -math.inf)  # the root that pfn takes leaves the order
        won = torch.zeros_like(sums, dtype=torch.bool).scatter_(1, scores.topk(self.winners, 1).indices, True)
        won &= sizes > 0
        first = self.param_groups[0]
        first["wins"] = first["wins"].to(device) + won
        kinds = max(self.experts, key=len)
        shares = won.sum(0) / (sizes > 0).sum(0)
        self.measured = {f"wins/{kind}": share for kind, share in zip(kinds, shares, strict=True)}
        return won

    def _move(self, parameter: Tensor, group: dict[str, Any], won: Tensor | None) -> None:
        """Take AdamW's step where the expert has won; a loser's numbers stay as they are, bit for bit."""
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        step = float(state["step"])  # on the host, so nothing waits
        denominator = (state["exp_avg_sq"].sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
        moved = parameter * (1 - group["lr"] * group["weight_decay"])
        moved = moved.addcdiv(state["exp_avg"], denominator, value=-group["lr"] / (1 - beta1**step))
        moved = moved.to(parameter.dtype)
        parameter.copy_(moved if won is None else torch.where(won, moved, parameter))

    def report(self) -> dict[str, dict[str, int]]:
        """Return the steps that every expert of every layer has won."""
        wins = self.param_groups[0]["wins"].cpu()
        return {
            layer: {name: int(wins[i, j]) for j, name in enumerate(names)}
            for i, (layer, names) in enumerate(zip(self.layers, self.experts, strict=True))
        }
