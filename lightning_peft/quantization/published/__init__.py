"""Checkpoints whose weights are published in few bits, read as they are: one file a format."""
