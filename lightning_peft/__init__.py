"""Fine-tune causal language models with adapters on PyTorch Lightning."""
