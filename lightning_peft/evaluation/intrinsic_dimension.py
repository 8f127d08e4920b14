"""d90: the least trained numbers that reach 90 % of a reference run (Li et al. 2018, arXiv:1804.08838)."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_peft.strict_json import read_object

logger = logging.getLogger(__name__)

LOSS = "loss"


@dataclass(frozen=True)
class DimensionTrial:
    """One run of a sweep over the dimension."""

    dimension: int
    score: float
    """The metric, or the distance of the validation loss below the base's; higher is better."""


@dataclass(frozen=True)
class Dimensions:
    """The findings of a sweep about the intrinsic dimension of its task."""

    trials: list[DimensionTrial]
    """The trials by rising dimension."""
    reference: float
    share: float

    @property
    def d90(self) -> int | None:
        """Return the smallest dimension swept that reaches `share` of the reference; None when none does."""
        return next((t.dimension for t in self.trials if t.score >= self.share * self.reference), None)


def read_dimensions(sweep: Path, reference: Path, metric: str, share: float) -> Dimensions:
    """Return the scores of the finished runs in the folders of `sweep`, and of the run folder `reference`.

    metric: "loss" takes the validation losses of `result.json`, subtracted from that of the base in the reference's
    `evaluation.json`; any other name is a metric in the `evaluation.json` of every run. Raises ValueError for a folder
    that lacks scores, or a reference no better than its base.
    """
    base = _found(reference, "evaluation.json", "base", "loss") if metric == LOSS else 0.0
    trials = []
    for folder in sorted(path.parent for path in sweep.glob("*/config.yaml")):
        adapter = _adapter(folder / "config.yaml")
        if adapter["method"] != "intrinsic":
            raise ValueError(f"sweep_path={sweep}: {folder.name} trained method {adapter['method']}, not intrinsic")
        if not _is_finished(folder):
            logger.info("%s is not finished: left out", folder)
            continue
        trials.append(DimensionTrial(adapter["dimension"], _score(folder, metric, base)))
    if not trials:
        raise ValueError(f"sweep_path={sweep}: holds no finished run; train -m adapter.dimension=... run_dir={sweep}")
    score = _score(reference, metric, base)
    if score <= 0:
        raise ValueError(f"reference_path={reference}: its {metric} is no better than the base's, {score:.4g}")
    return Dimensions(sorted(trials, key=lambda trial: trial.dimension), score, share)


def _score(folder: Path, metric: str, base: float) -> float:
    if metric == LOSS:
        loss = _found(folder, "result.json", "validation_loss")
        if loss is None:
            raise ValueError(f"{folder}: trained without validation rows, so it has no validation loss")
        return base - loss
    metrics = _found(folder, "evaluation.json", "adapter", "metrics")
    if metric not in metrics:
        raise ValueError(f"metric={metric}: {folder} has {', '.join([LOSS, *metrics])}")
    return metrics[metric]


def _is_finished(folder: Path) -> bool:
    return (folder / "result.json").is_file() and _found(folder, "result.json", "status") == "finished"


def _adapter(path: Path) -> dict[str, Any]:
    """Return the options of the adapter in a run's config.yaml. Raises ValueError for a damaged file."""
    try:
        adapter = yaml.safe_load(path.read_text(encoding="utf-8"))["adapter"]
        return {"method": adapter["method"], "dimension": adapter.get("dimension")}
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: damaged (not the options of a run); move its folder away to leave it out") from None


def _found(folder: Path, name: str, *keys: str) -> Any:
    """Return what a file of a run holds under the keys. Raises ValueError where the file lacks them."""
    again = f"run lightning-peft evaluate adapter_path={folder}" if name == "evaluation.json" else "finish the run"
    if not (folder / name).is_file():
        raise ValueError(f"{folder}: has no {name}; {again}")
    found: Any = read_object(folder / name, again)
    for key in keys:
        if not isinstance(found, dict) or key not in found:
            raise ValueError(f"{folder / name}: has no {'.'.join(keys)}; {again}")
        found = found[key]
    return found
