"""The losses: model and batch to a summed loss."""
