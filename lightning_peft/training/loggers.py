"""Loggers that need a decision Lightning's own do not make."""

import logging
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger

logger = logging.getLogger(__name__)


def has_wandb_key() -> bool:
    """Whether a run could log in without asking: a key in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return netrc.is_file() and "wandb" in netrc.read_text()


def wandb_logger(run_dir: str, project: str, mode: str = "auto", **options: Any) -> WandbLogger:
    """Weights & Biases, online where there is a key, else into `<run_dir>/wandb` for a later `wandb sync`.

    `options` go to `wandb.init` by way of Lightning's WandbLogger, which names an unknown one.
    """
    if mode not in ("auto", "online", "offline"):
        raise ValueError(f"logger.wandb.mode={mode!r}: must be auto, online or offline")
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE", "online" if has_wandb_key() else "offline")
        if mode == "offline":
            logger.info("wandb: no key found, logging offline to %s/wandb (wandb sync uploads it)", run_dir)
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    return WandbLogger(project=project, save_dir=run_dir, offline=mode == "offline", **options)
