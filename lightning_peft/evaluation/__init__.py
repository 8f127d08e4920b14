"""Scores of a base model and its adapter on held-out rows."""
