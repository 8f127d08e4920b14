"""Fine-tune causal language models with adapters on PyTorch Lightning."""

import lightning_peft.ctrl_c  # noqa: F401, I001  # first: what is imported after it can be interrupted
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_peft.api import Run, finetune, load

    __version__: str

__all__ = ["Run", "finetune", "load"]


def __getattr__(name: str) -> Any:
    """Import an attribute on demand, as --help needs no torch and Ctrl-C is to work from the first moment."""
    if name == "__version__":
        return _version()
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lightning_peft import api

    return getattr(api, name)


def _version() -> str:
    # These are four fifths of what the command imports before it heeds Ctrl-C.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lightning-peft")
    except PackageNotFoundError:  # a source tree on PYTHONPATH
        return "unknown"
