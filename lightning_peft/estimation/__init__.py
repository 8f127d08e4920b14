"""What a training step needs, found by running it on tensors without memory: bytes by component, FLOPs, traffic."""
