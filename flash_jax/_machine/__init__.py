"""Facts about this machine, and the tiles that follow from them."""
