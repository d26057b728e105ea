"""Facts about this machine, the tiles that follow from them, and its clock."""
