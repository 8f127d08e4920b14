"""What a run folder says about the run in it: unused, to be resumed from a checkpoint, or finished."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lightning_peft.config import TrainConfig, plain

LEFT_BY_A_RUN = ("checkpoints", "metrics.csv", "result.json", "adapter", "model")
"""What a run folder holds once something happened in it."""
NOT_COMPARED = ("resume", "dry_run", "run_dir", "logger", "callbacks", "cluster")
"""What may differ between the starts of one run."""

FREE_TO_CHANGE = (
    "trainer.max_steps", "trainer.max_epochs", "trainer.devices", "trainer.num_nodes",
    "trainer.accumulate_grad_batches", "strategy.kind", "strategy.cpu_offload", "data.cache_dir", "compile",
    "activation_checkpointing",
)  # fmt: skip
"""Options that a resumed run may change; the global batch that some make together must stay."""


@dataclass(frozen=True)
class Start:
    """How a run begins."""

    checkpoint: Path | None = None
    """What to resume from; None starts at step 0."""
    result: dict[str, Any] | None = None
    """The result of a run that is finished already."""


def find_start(config: TrainConfig, run_dir: Path) -> Start:
    """Raises ValueError for a used folder that is not to be resumed, or a config that changed since.

    A folder with nothing but `config.yaml` is one whose ranks have not begun.
    """
    # Lightning, which the verbs of a sweep do without.
    from lightning_peft.checkpoint.resume import latest_checkpoint, verify_checkpoint

    used = any((run_dir / name).exists() for name in LEFT_BY_A_RUN)
    if config.resume not in ("never", "auto"):
        path = Path(config.resume)
        if not path.is_file():
            raise ValueError(f"resume={config.resume}: no such checkpoint; use auto, never or a .ckpt file")
        verify_checkpoint(path)
        origin = path.resolve().parent.parent
        if used and origin != run_dir.resolve():
            raise ValueError(f"run_dir={run_dir} holds another run than resume={config.resume}: name a new folder")
        check_saved_config(config, origin)
        return Start(path)
    if not used:
        return Start()
    if config.resume == "never":
        raise ValueError(f"run_dir={run_dir} holds a run already: resume=auto continues it, or name another folder")
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    result = finished_result(config, run_dir)
    if checkpoint is None and result is None:
        return Start()
    check_saved_config(config, run_dir)
    return Start(checkpoint, result)


def finished_result(config: TrainConfig, run_dir: Path) -> dict[str, Any] | None:
    """`result.json` of a run that reached the end it was given, if that is the end it is given now."""
    path = run_dir / "result.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    saved = OmegaConf.load(run_dir / "config.yaml").trainer
    same_end = all(saved.get(key) == config.trainer.get(key) for key in ("max_steps", "max_epochs"))
    return result if result["status"] == "finished" and same_end else None


def check_saved_config(config: TrainConfig, run_dir: Path) -> None:
    path = run_dir / "config.yaml"
    if not path.exists():
        raise ValueError(f"{path}: missing, so the checkpoint's options cannot be compared with these")
    saved = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(saved, dict)
    check_same_config(compared(saved), compared(plain(config)))
    before, now = global_batch(saved["trainer"]), global_batch(config.trainer)
    if before != now:
        raise ValueError(
            f"resume: an optimiser step was {before} micro batches over all ranks (devices x num_nodes x "
            f"accumulate_grad_batches), is {now}: set trainer.accumulate_grad_batches so that it stays {before}"
        )


def global_batch(trainer: dict[str, Any]) -> int | None:
    """Micro batches in an optimiser step over all ranks; None where `trainer.devices` is left to the machine."""
    counts = [trainer.get(key, 1) for key in ("devices", "num_nodes", "accumulate_grad_batches")]
    return math.prod(counts) if all(isinstance(count, int) and count > 0 for count in counts) else None


def compared(config: dict[Any, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in config.items() if key not in NOT_COMPARED}


def check_same_config(checkpoint_config: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raise ValueError naming every option that differs between two resolved configs (nested plain mappings).

    Options in `FREE_TO_CHANGE` may differ.
    """
    before, now = _flatten(checkpoint_config), _flatten(config)
    absent = object()
    changed = [
        f"{key} (was {_show(before, key)}, is {_show(now, key)})"
        for key in sorted(before.keys() | now.keys())
        if key not in FREE_TO_CHANGE and before.get(key, absent) != now.get(key, absent)
    ]
    if changed:
        raise ValueError(
            f"resume: the checkpoint was made with another config: {', '.join(changed)}; "
            "restore these, or start afresh in a new run_dir"
        )


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _show(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "not set"
