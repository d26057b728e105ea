"""Tiny subjects of the benchmark, right and wrong, which a worker builds without JAX.

They run in a worker only, where the benchmark's folder is the package ``bench``.
"""

import os
import sys

import numpy as np


def right(case, inputs):
    """The exact results."""
    from bench.subjects import Subject  # the module is collected where this package is not

    exact = _exact(case, inputs)
    return Subject(lambda: None, lambda: exact, compile_seconds=0.25, temporary_bytes=2**20)


def off(case, inputs):
    """Results that are off by a half."""
    return right(case, inputs)._replace(results=lambda: [x + 0.5 for x in _exact(case, inputs)])


def not_a_number(case, inputs):
    """Results with one NaN."""
    results = _exact(case, inputs)
    results[0][0, 0, 0, 0] = np.nan
    return right(case, inputs)._replace(results=lambda: results)


def short(case, inputs):
    """Results of another shape."""
    results = lambda: [x[..., :1] for x in _exact(case, inputs)]  # noqa: E731
    return right(case, inputs)._replace(results=results)


def refuses(case, inputs):
    """An error of two lines."""
    raise ValueError("no such\nluck")


def dies(case, inputs):
    """A process that ends without an answer."""
    print("a long story\nout of memory", file=sys.stderr, flush=True)
    os._exit(3)


def dies_later(case, inputs):
    """A process that ends in its first round."""
    return right(case, inputs)._replace(run=lambda: dies(case, inputs))


def talks(case, inputs):
    """A subject that writes where the answers go."""
    subject = right(case, inputs)
    os.write(1, b"hello\n")
    return subject._replace(run=lambda: print("world", flush=True))


def _exact(case, inputs):
    from bench.exact import exact_rows

    return list(exact_rows(case, np.arange(case.T), inputs))
