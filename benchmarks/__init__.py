"""What the package costs and achieves, measured; results/ holds the figures, README.md shows them."""
