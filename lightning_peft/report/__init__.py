"""Runs and sweeps as one page a person can show: curves, tables, samples, and where everything comes from."""
