"""Fine-tune causal language models with adapters on PyTorch Lightning."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("lightning-peft")
except PackageNotFoundError:  # a source tree on PYTHONPATH
    __version__ = "unknown"
