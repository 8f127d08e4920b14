"""Adapter methods, one file each, and how they are put into a model."""
