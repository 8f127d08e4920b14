"""The Lightning module, its precision, strategies and callbacks."""
