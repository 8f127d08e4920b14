"""Four-bit frozen weights: NF4 and FP4 over the bitsandbytes operators."""
