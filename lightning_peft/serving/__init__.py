"""A trained adapter for others: files of other engines, and a server of our own."""
