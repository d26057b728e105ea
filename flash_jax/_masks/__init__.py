"""Which query may read which key, and the tiles that follow."""
