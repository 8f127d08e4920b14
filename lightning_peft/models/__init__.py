"""Causal language models from folders, hubs and GGUF files."""
