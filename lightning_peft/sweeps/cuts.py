"""The largest rank of a sweep, cut by SVD without training, beside what smaller ranks learn."""

import logging
import shlex
from pathlib import Path
from typing import Any

from lightning_peft.checkpoint.lineage import read_lineage
from lightning_peft.strict_json import read_object
from lightning_peft.sweeps.statistics import SeedGroup, best_of_ranks, share_of_parameters
from lightning_peft.sweeps.sweep import Sweep, score

logger = logging.getLogger(__name__)

INSPECTION, ADAPTER = "inspection.json", "adapter"


def cut_sentence(sweep: Sweep, folder: Path, shown: str) -> str | None:
    """Say what `inspect smaller_ranks=true` found of the best trial of the largest rank, or how to have it found.

    `shown` is the sweep's folder as it was typed. The result is None where no two ranks are compared.
    """
    ranks = best_of_ranks(sweep)
    if len(ranks) < 2:
        return None
    largest = max(ranks)
    trial = best_trial_of(sweep, ranks[largest])
    if (found := scores_of_cuts(folder / trial)) is None:
        ask = shlex.join(["lightning-peft", "inspect", f"{shown}/{trial}", "smaller_ranks=true"])
        return f"whether rank {largest} can be cut without training is not known yet: {ask}"
    where = f"{trial}, cut by SVD without training"
    if (rank := found["as_good"]) is None:
        worse = max(found["ranks"], key=lambda entry: entry["rank"], default=None)
        if worse is None:
            return f"{where}: there is no smaller rank"
        low, high = worse["interval"]
        return (
            f"{where}: rank {worse['rank']} is worse than the whole beyond noise: loss {worse['loss']:.4g} and "
            f"{found['loss']:.4g}, 95 % of the difference from {low:.2g} to {high:.2g} over {found['rows']} rows"
        )
    entry = next(entry for entry in found["ranks"] if entry["rank"] == rank)
    low, high = entry["interval"]
    share = share_of_parameters(ranks[rank], ranks[largest]) if rank in ranks else ""
    return (
        f"{where}: rank {rank} is within noise of the whole of rank {largest}{share}: loss {entry['loss']:.4g} and "
        f"{found['loss']:.4g}, 95 % of the difference from {low:.2g} to {high:.2g} over {found['rows']} rows"
    )


def best_trial_of(sweep: Sweep, group: SeedGroup) -> str:
    """Return the name of a group's best trial."""
    scored = {name: value for name in group.names if (value := score(sweep, sweep.trial(name))) is not None}
    return min(scored, key=lambda name: scored[name])


def scores_of_cuts(run_dir: Path) -> dict[str, Any] | None:
    """Return what the run's inspection says of smaller ranks; None without one, or where it is of another adapter.

    The adapters are told apart by their checksums: times of files follow a clock that may be set.
    """
    path, lineage = run_dir / INSPECTION, read_lineage(run_dir / ADAPTER)
    if not path.is_file():
        return None
    content = read_object(path, "inspect it again")
    if lineage is not None and content.get("adapter_sha256") != lineage.adapter_sha256:
        if "adapter_sha256" not in content:
            logger.warning("%s: does not say of which adapter it is; inspect it again to have its ranks counted", path)
        return None
    found: dict[str, Any] | None = content.get("smaller_ranks")
    return found
