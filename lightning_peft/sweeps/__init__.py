"""A sweep: its trials, the folder in which it stands, its workers on one machine, and its table."""
