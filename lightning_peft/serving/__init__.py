"""A trained adapter for others: files of other engines, a server of our own, and what stands in front of vLLM."""
