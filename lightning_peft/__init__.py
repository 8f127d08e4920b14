"""Fine-tune causal language models with adapters on PyTorch Lightning."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_peft.api import Run, finetune, load

__all__ = ["Run", "finetune", "load"]

try:
    __version__ = version("lightning-peft")
except PackageNotFoundError:  # a source tree on PYTHONPATH
    __version__ = "unknown"


def __getattr__(name: str) -> Any:
    """Import what is asked for, so that the command answers --help without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lightning_peft import api

    return getattr(api, name)
