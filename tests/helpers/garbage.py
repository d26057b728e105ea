"""The collection of garbage, which takes a few percent of the time where JAX traces programs.

Python looks at what is new after every 2000 objects. A trace makes many, and hardly any is garbage.
"""

import gc


def collect_seldom():
    """What is imported by now stays, so no collection need look at it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
