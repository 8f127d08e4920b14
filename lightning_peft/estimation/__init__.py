"""The needs of a training step, found by a run on tensors without memory: bytes by component, FLOPs, traffic."""
