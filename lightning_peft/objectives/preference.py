"""Losses of pairs of answers: DPO, IPO, SimPO and ORPO, each a function of the log-probabilities of both.

A sum over pairs, divided once by the pairs of the whole optimiser step: no loss, margin or gradient depends on how the
pairs were packed, cut into micro batches or shared among ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.data.batch import Batch
from lightning_peft.data.config import RowKind
from lightning_peft.objectives.objective import Objective, ObjectiveConfig
from lightning_peft.objectives.reference import ReferencedLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # a start that trains nothing does without it


class Pairs(NamedTuple):
    """P pairs of answers, (P,) fp32 each: summed log-probabilities of their supervised tokens, and their numbers."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    reference_chosen: Tensor
    """Log-probabilities that the model gave before training; zero for an objective without a reference."""
    reference_rejected: Tensor

    @property
    def ratios(self) -> tuple[Tensor, Tensor]:
        """Return how much more likely than to the reference each answer is, as log(p / p_ref)."""
        return self.chosen - self.reference_chosen, self.rejected - self.reference_rejected

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Return the log-probability per token of each answer."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


class JudgedPairs(NamedTuple):
    """An objective's verdict on P pairs, (P,) fp32 each."""

    losses: Tensor
    chosen_rewards: Tensor
    """The worth of each answer, as the model is taken to find it."""
    rejected_rewards: Tensor


PairLosses = Callable[[Pairs, Any], JudgedPairs]
MEASURED = (
    "rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy", "logps/chosen", "logps/rejected",
)  # fmt: skip
"""Means over pairs that are logged: rewards and log-probabilities of the answers, how far and how often the chosen one
is ahead."""


class PreferenceLoss(ReferencedLoss):
    """The losses of pairs of answers, summed; a chosen answer stands before its rejected one."""

    measures = MEASURED

    def __init__(
        self,
        model: "PreTrainedModel",
        config: ObjectiveConfig,
        packing: bool | str,
        losses: PairLosses,
        uses_reference: bool,
    ):
        super().__init__(model, packing)
        self.config = config
        self.losses = losses
        self.uses_reference = uses_reference

    def judged(self, batch: Batch, sums: Tensor, counts: Tensor, reference: Tensor) -> Tensor:
        pairs = Pairs(*_split(sums), *_split(counts), *_split(reference))
        judged = self.losses(pairs, self.config)
        self.measured = _measured(pairs, judged)
        return judged.losses.sum()


def _split(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return (S,) values of samples as those of the chosen and of the rejected answers."""
    chosen, rejected = values.view(-1, 2).unbind(1)
    return chosen, rejected


def _measured(pairs: Pairs, judged: JudgedPairs) -> dict[str, tuple[Tensor, Tensor]]:
    chosen, rejected = judged.chosen_rewards.detach(), judged.rejected_rewards.detach()
    ahead = (chosen > rejected).float()
    values = (chosen, rejected, chosen - rejected, ahead, pairs.chosen.detach(), pairs.rejected.detach())
    return {name: (value.sum(), torch.ones_like(value).sum()) for name, value in zip(MEASURED, values, strict=True)}


def pairwise(
    config: type[ObjectiveConfig], losses: PairLosses, formula: str, paper: str, uses_reference: bool = False
) -> Objective:
    """Return the row of an objective that is a function of `Pairs`."""
    return Objective(
        config,
        lambda model, options, packing: PreferenceLoss(model, options, packing, losses, uses_reference),
        rows=RowKind.pairs,
        uses_reference=uses_reference,
        logs=MEASURED,
        formula=formula,
        paper=paper,
    )


def check_above_zero(**options: float) -> None:
    """Raise ValueError for an option of the objective that is not above 0."""
    for name, value in options.items():
        if not value > 0:
            raise ValueError(f"objective.{name}={value}: must be above 0")


@dataclass
class DPOConfig(ObjectiveConfig):
    name: str = "dpo"
    beta: float = 0.1
    """Price of leaving the reference: the smaller, the further the model goes."""
    label_smoothing: float = 0.0
    """Share of the pairs that are taken to be labelled the wrong way round (cDPO); below 0.5."""
    sft_weight: float = 0.0
    """Factor of the chosen answer's cross entropy beside it, per token (alpha of RPO; 1 there): keeps the chosen answer
    likely, which DPO alone need not."""

    def __post_init__(self) -> None:
        check_above_zero(beta=self.beta)
        if not self.sft_weight >= 0:
            raise ValueError(f"objective.sft_weight={self.sft_weight}: must be 0 or more")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"objective.label_smoothing={self.label_smoothing}: must be at least 0 and below 0.5")


def dpo(pairs: Pairs, config: DPOConfig) -> JudgedPairs:
    """Return -log sigmoid(beta (r_w - r_l)), r = log(p / p_ref)   (Rafailov et al. 2023, arXiv:2305.18290, eq. 7).

    With `sft_weight` a, - a log p_w / |w| is added   (Pang et al. 2024, arXiv:2404.19733, eq. 1).
    """
    chosen, rejected = (config.beta * ratio for ratio in pairs.ratios)
    smoothing = config.label_smoothing
    losses = -(1 - smoothing) * F.logsigmoid(chosen - rejected) - smoothing * F.logsigmoid(rejected - chosen)
    if config.sft_weight:
        losses = losses - config.sft_weight * pairs.means[0]
    return JudgedPairs(losses, chosen, rejected)


@dataclass
class IPOConfig(ObjectiveConfig):
    name: str = "ipo"
    beta: float = 0.1
    """tau of the paper: the margin per token aimed at is 1 / (2 beta)."""

    def __post_init__(self) -> None:
        check_above_zero(beta=self.beta)


def ipo(pairs: Pairs, config: IPOConfig) -> JudgedPairs:
    """Return (r_w / |w| - r_l / |l| - 1 / (2 beta))^2   (Azar et al. 2023, arXiv:2310.12036, eq. 17).

    Ratios are taken per token, as TRL does after asking the authors.
    """
    chosen, rejected = pairs.ratios
    margin = chosen / pairs.chosen_tokens - rejected / pairs.rejected_tokens
    return JudgedPairs((margin - 1 / (2 * config.beta)) ** 2, config.beta * chosen, config.beta * rejected)


@dataclass
class SimPOConfig(ObjectiveConfig):
    name: str = "simpo"
    beta: float = 2.0
    """Factor of the log-probability per token; 2 to 2.5 in the paper."""
    gamma: float = 1.0
    """Margin that the reward of the chosen answer is to be ahead by; 0.5 to 1.5 in the paper."""

    def __post_init__(self) -> None:
        check_above_zero(beta=self.beta)
        if not self.gamma >= 0:
            raise ValueError(f"objective.gamma={self.gamma}: must be 0 or more")


def simpo(pairs: Pairs, config: SimPOConfig) -> JudgedPairs:
    """Return -log sigmoid(beta (log p_w / |w| - log p_l / |l|) - gamma) (Meng et al. 2024, arXiv:2405.14734, eq. 6)."""
    chosen, rejected = (config.beta * mean for mean in pairs.means)
    return JudgedPairs(-F.logsigmoid(chosen - rejected - config.gamma), chosen, rejected)


@dataclass
class ORPOConfig(ObjectiveConfig):
    name: str = "orpo"
    odds_weight: float = 0.1
    """Factor of the odds ratio beside the cross entropy of the chosen answer, lambda of the paper."""

    def __post_init__(self) -> None:
        check_above_zero(odds_weight=self.odds_weight)


def orpo(pairs: Pairs, config: ORPOConfig) -> JudgedPairs:
    """Return -log P_w - lambda log sigmoid(log(odds_w / odds_l)), P per token   (Hong et al. 2024,
    arXiv:2403.07691, eq. 6-7).

    The cross entropy is the mean over each chosen answer's own tokens, so that a pair counts as one.
    """
    chosen, rejected = pairs.means
    log_odds = (chosen - log_one_minus_exp(chosen)) - (rejected - log_one_minus_exp(rejected))
    losses = -chosen - config.odds_weight * F.logsigmoid(log_odds)
    return JudgedPairs(losses, config.odds_weight * chosen, config.odds_weight * rejected)


def log_one_minus_exp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) of negative x, exact near 0 and far from it; above -1e-6 it stays what it is there."""
    x = x.clamp(max=-1e-6)
    return torch.where(x > -0.6931, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


DPO = pairwise(DPOConfig, dpo, "-log sigmoid(beta (r_w - r_l)), r = log(p / p_ref)", "arXiv:2305.18290", True)
IPO = pairwise(IPOConfig, ipo, "(r_w per token - r_l per token - 1 / (2 beta))^2", "arXiv:2310.12036", True)
SIMPO = pairwise(SimPOConfig, simpo, "-log sigmoid(beta (log p_w - log p_l, per token) - gamma)", "arXiv:2405.14734")
ORPO = pairwise(ORPOConfig, orpo, "-log p_w per token - lambda log sigmoid(log odds ratio)", "arXiv:2403.07691")
