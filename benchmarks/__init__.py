"""What the package costs and achieves, measured; results/ holds the figures, docs/benchmarks.md shows them."""
