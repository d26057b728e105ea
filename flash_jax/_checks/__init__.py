"""Checks of arguments: an error names the argument, what it must be and what it is."""
