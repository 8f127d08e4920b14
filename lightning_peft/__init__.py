"""Fine-tune causal language models with adapters on PyTorch Lightning."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_peft.api import Run, finetune, load

__all__ = ["Run", "finetune", "load"]


def __getattr__(name: str) -> Any:
    """Import what is asked for, so that the command answers --help without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lightning_peft import api

    return getattr(api, name)
