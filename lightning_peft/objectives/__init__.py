"""What is minimised: model and batch to a summed loss."""
