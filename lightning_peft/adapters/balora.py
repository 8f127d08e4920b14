"""BaLoRA: LoRA with a random A whose variance follows the input (Coscia, Lowe, Welling 2026, arXiv:2605.08110).

The equations were read in a plan of others for the paper's code, which was not published. Where they leave choices to a
language model, the choices are ours: what the variance is computed from, noise for each token, and the KL's weight.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter, Target
from lightning_peft.adapters.lora import PEFT, LoRAConfig, LoRALinear
from lightning_peft.adapters.method import Contract, Method, linears
from lightning_peft.kernels.frozen_linear import Base

WIDTH = 256
"""Hidden width of the network that gives the variances."""


@dataclass
class BaLoRAConfig(LoRAConfig):
    method: str = "balora"
    prior: float = 0.05
    """Drop rate p of the prior, whose variance is p / (1 - p) times A squared; the variance starts there."""
    kl_weight: float = 1e-5
    """Weight of the KL to the prior, a sum over the elements of all A (ours: unweighted it swamps the loss)."""
    kl_warmup_steps: int = 50
    """Optimiser steps over which that weight grows from 0 (ours)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.prior < 1:
            raise ValueError(f"adapter.prior={self.prior}: must be above 0 and below 1")
        if not self.kl_weight >= 0:
            raise ValueError(f"adapter.kl_weight={self.kl_weight}: must be 0 or more")
        if self.kl_warmup_steps < 0:
            raise ValueError(f"adapter.kl_warmup_steps={self.kl_warmup_steps}: must be 0 or more")
        if not self.initialization.is_neutral:
            raise ValueError(f"adapter.init={self.init}: the mean of A has a part in the base then; use kaiming")


def kl_to_prior(alpha: Tensor, prior: float) -> Tensor:
    """Return KL(N(a, alpha a^2) || N(0, p/(1-p) a^2)) of one element, for any a but 0.

    The KL is ((alpha + 1) (1-p)/p + log(p/(1-p)) - log alpha - 1) / 2.
    """
    ratio = prior / (1 - prior)
    return ((alpha + 1) / ratio + math.log(ratio) - alpha.log() - 1) / 2


class InputVariance(nn.Module):
    """One variance for every sample and layer, from the mean of the sample's input embeddings.

    A network of two hidden layers with softplus at its end, shared by all layers and fp32, sees where samples begin
    by their positions, so a packed sample has the variance it has alone, and what is padding by `own_tokens`, or by an
    attention mask. In training, or inside `sampling`, a forward pass of the model leaves `variances`, (B, T, layers),
    for the layers to read.
    """

    own_tokens: Tensor | None = None
    """Set around a forward pass by what knows it: (B, T) bool, false where a token is no part of its sample."""

    def __init__(self, config: BaLoRAConfig, targets: list[Target], model: nn.Module):
        super().__init__()
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        sizes = (embeddings.weight.shape[1], WIDTH, WIDTH, len(targets))
        self.prior, self.kl_weight = config.prior, config.kl_weight
        self.places = {target.name: place for place, target in enumerate(targets)}
        self.sizes = [(target.rank or 0) * target.in_features for target in targets]
        self.variance_net = nn.ModuleList(nn.Linear(*pair) for pair in zip(sizes, sizes[1:], strict=False))
        self.reset_parameters()
        self.is_sampling, self.kl_share = False, 0.0
        self.positions: Tensor | None = None
        self.mask: Tensor | None = None
        self.variances: Tensor | None = None
        self.kls: list[tuple[Tensor, Tensor]] = []
        """Sum and number of the samples' KLs, of each forward pass that is differentiated."""
        decoder: Any = model.base_model
        decoder.register_forward_pre_hook(self._begin, with_kwargs=True)
        embeddings.register_forward_hook(self._see)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        ratio = self.prior / (1 - self.prior)
        for layer in self.variance_net:
            layer.reset_parameters()  # type: ignore[operator]
        nn.init.constant_(self.variance_net[-1].bias, math.log(math.expm1(ratio)))  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        """Map features (S, width of the model) to variances (S, layers), above 0."""
        for layer in self.variance_net[:-1]:
            features = F.gelu(layer(features))
        return F.softplus(self.variance_net[-1](features)) + 1e-8

    def regularization(self) -> Tensor | None:
        """Return the weighted KL, a mean over the samples of the passes since it was last asked for; None without any.

        A loss has several passes where samples are run apart.
        """
        if not self.kls:
            return None
        sums, counts = zip(*self.kls, strict=True)
        self.kls = []
        return self.kl_weight * self.kl_share * torch.stack(sums).sum() / torch.stack(counts).sum()

    def _begin(self, decoder: nn.Module, inputs: Any, keywords: dict[str, Any]) -> None:
        self.positions, self.variances = keywords.get("position_ids"), None
        self.mask = self.own_tokens
        if self.mask is None and isinstance(given := keywords.get("attention_mask"), Tensor) and given.dim() == 2:
            self.mask = given.bool()

    def _see(self, embeddings: nn.Module, inputs: Any, output: Tensor) -> None:
        if not (self.training or self.is_sampling):
            return
        # The sums are in fp32 whatever the model computes in, its autocast included: 16 bits lose small variances.
        with torch.autocast(output.device.type, enabled=False):
            samples, count = self._samples(output)
            flat = output.detach().reshape(-1, output.shape[-1]).to(self.variance_net[0].weight.dtype)  # type: ignore[arg-type]
            own = torch.ones_like(flat[:, 0])
            if self.mask is not None and self.mask.shape == output.shape[:2]:
                own = self.mask.to(flat.device).flatten().to(flat.dtype)
            sums = flat.new_zeros(count, flat.shape[1]).index_add(0, samples, flat * own[:, None])
            lengths = flat.new_zeros(count).index_add(0, samples, own).clamp(min=1)
            variances = self(sums / lengths[:, None])
            if self.training and torch.is_grad_enabled():
                elements = variances.new_tensor(self.sizes)
                present = (torch.arange(count, device=flat.device) <= samples[-1]).to(flat.dtype)
                self.kls.append(((kl_to_prior(variances, self.prior) @ elements) @ present, present.sum()))
            self.variances = variances[samples].view(*output.shape[:-1], -1)

    def _samples(self, output: Tensor) -> tuple[Tensor, int]:
        """Return the sample of each token, (B T,), and a bound above all of them, without asking the device.

        A row is one sample, or begins a new one wherever its positions begin anew.
        """
        rows, width = output.shape[:2]
        firsts = torch.zeros(rows, width, dtype=torch.int64, device=output.device)
        firsts[:, 0] = 1
        if self.positions is not None:
            firsts |= (self.positions.expand(rows, width) == 0).to(torch.int64)
        return firsts.flatten().cumsum(0) - 1, rows * width


@contextmanager
def sampling(model: nn.Module) -> Iterator[None]:
    """Let a model in eval mode draw its BaLoRA layers as in training, in every forward pass anew."""
    found = [module for module in model.modules() if isinstance(module, InputVariance)]
    for shared in found:
        shared.is_sampling = True
    try:
        yield
    finally:
        for shared in found:
            shared.is_sampling, shared.variances = False, None


class BaLoRALinear(LoRALinear):
    """y = W x + scaling * B (A x + sqrt(alpha(x) (A * A) (x * x)) eps), eps standard normal for every token.

    The formula gives the distribution of the output where each element of A has the variance alpha(x) A^2 (the local
    form of the draw). Without noise, outside training and `sampling`, it is a LoRA.
    """

    def __init__(self, base_layer: nn.Module, target: Target, config: BaLoRAConfig, shared: InputVariance):
        super().__init__(base_layer, target, config)
        # The tuple keeps the network from being a submodule of each layer: the model registers it once.
        self._shared = (shared,)
        self.place = shared.places[target.name]

    def noise(self, x: Tensor) -> Tensor:
        """Return the term added to A x in a drawn pass, (..., rank) in the dtype of A."""
        variances = self._shared[0].variances
        assert variances is not None
        A = self.lora_A.weight
        spread = x.to(A.dtype).square() @ A.square().t() * variances[..., self.place, None].to(A.dtype)
        return spread.clamp(min=torch.finfo(A.dtype).tiny).sqrt() * torch.randn_like(spread)

    def adapt(self, x: Tensor, base_output: Tensor) -> Tensor:
        if self._shared[0].variances is None:
            return super().adapt(x, base_output)
        dtype = base_output.dtype
        dropped = F.dropout(x, self.dropout, self.training)
        noise = self.noise(dropped)
        inner = dropped.to(dtype) @ self.lora_A.weight.to(dtype).t() + noise.to(dtype)
        return base_output + self.scaling * (inner @ self.lora_B.weight.to(dtype).t())

    def fused(self, x: Tensor, base: Base) -> Tensor | None:
        return super().fused(x, base) if self._shared[0].variances is None else None


class KLWarmup:
    """Raises the weight of the KL with the optimiser steps."""

    def __init__(self, shared: InputVariance, steps: int):
        self.shared, self.steps = shared, steps
        self.after_step(0)

    def after_step(self, step: int) -> None:
        self.step = step
        self.shared.kl_share = min(1.0, step / self.steps) if self.steps else 1.0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.after_step(state["step"])


def kl_warmup(adapters: Mapping[str, Adapter], config: BaLoRAConfig, total_steps: int) -> KLWarmup:
    """Return the schedule of the KL's weight."""
    layer = next(layer for layer in adapters.values() if isinstance(layer, BaLoRALinear))
    return KLWarmup(layer._shared[0], config.kl_warmup_steps)


METHOD = Method(
    BaLoRAConfig,
    linears(BaLoRALinear),
    trained=(
        "lora_A.weight",
        "lora_B.weight",
        *(f"variance_net.{i}.{part}" for i in range(3) for part in ("weight", "bias")),
    ),
    change="s B A, A normal with variance alpha(x) A^2; its mean is a LoRA",
    paper="arXiv:2605.08110",
    reconstruction="what the variance is computed from (mean input embedding of the sample), the weight and warm-up of "
    "the KL, noise drawn for each token",
    count="r (d + k), and one network for all",
    shared=InputVariance,
    schedule=kl_warmup,
    peft=replace(PEFT, shared_file="balora_variance.safetensors"),
    contract=Contract(
        trained=lambda t: t.rank * (t.out_features + t.in_features),
        shared=lambda config: 64 * WIDTH + WIDTH + WIDTH * WIDTH + WIDTH + WIDTH * 14 + 14,
    ),
)
