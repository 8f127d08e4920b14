"""Memory of several runs that train in one process on one base, from the estimate of each alone."""

from collections.abc import Sequence

from lightning_peft.estimation.memory import Estimate
from lightning_peft.estimation.model_states import ADAPTERS, IMPORTANCE, OPTIMIZER
from lightning_peft.estimation.trace import ACTIVATIONS, GRADIENTS

OWN = (ADAPTERS, GRADIENTS, OPTIMIZER, IMPORTANCE, ACTIVATIONS)
"""Components that each run has for itself; the others, the base above all, are there once."""


def memory_together(estimates: Sequence[Estimate]) -> int:
    """Return the bytes at the peak of one process for runs of these estimates; no less than it takes."""
    shared = max(found.peak - sum(part.at_peak for part in found.components if part.name in OWN) for found in estimates)
    return shared + sum(part.largest for found in estimates for part in found.components if part.name in OWN)


def most_together(estimates: Sequence[Estimate], limit: float) -> int:
    """Return how many of these runs, whichever they are, fit into so many bytes together; 0 where not one does."""
    largest = sorted(estimates, key=lambda found: memory_together([found]), reverse=True)
    fitting = (count for count in range(len(largest), 0, -1) if memory_together(largest[:count]) <= limit)
    return next(fitting, 0)
