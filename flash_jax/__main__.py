"""The entry of ``python -m flash_jax`` and of the command ``flash-jax``."""

import sys

from ._cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
