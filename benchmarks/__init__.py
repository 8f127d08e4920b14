"""The package's costs and gains, measured; results/ holds the figures, docs/benchmarks.md shows them."""
