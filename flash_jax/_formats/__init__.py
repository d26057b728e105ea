"""How a tile is multiplied: number formats, and what they are made from."""
