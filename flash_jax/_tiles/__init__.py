"""Where things lie: tiles of positions, and of arrays in memory."""
