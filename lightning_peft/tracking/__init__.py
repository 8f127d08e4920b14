"""The records a run writes while it trains: metrics.csv, and the services that show it."""
