"""Text from a model with its adapter."""
