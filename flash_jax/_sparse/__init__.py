"""Which blocks of scores are worth computing: chosen from the data."""
