"""What a run writes down while it trains: metrics.csv, and the services that show it."""
