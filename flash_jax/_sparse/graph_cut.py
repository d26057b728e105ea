"""Parts that need not be contiguous: minimum cuts of the graph of blocks, on the host.

Where texts alternate, A B A B, the parts A and B are no runs of blocks, and cumulative sums do not
give their cuts. The graph is then cut in two, and one of the halves again, until there are enough
parts. One cut is made in two steps:

1. Seeds. The second eigenvector of the normalised affinity orders the blocks; a quarter of them at
   either end is the safest. It is the relaxation of the minimum normalised cut [1].
2. The minimum cut between the two seeds, exactly: a maximum flow, by ``scipy.sparse.csgraph``. All
   other blocks fall on the side on which less affinity is cut. Improving a cut by flow is due to
   [2].

Without seeds the minimum cut of a graph of blocks nearly always cuts off a single block.

[1] Shi & Malik, Normalized Cuts and Image Segmentation, 2000, https://doi.org/10.1109/34.868688
[2] Lang & Rao, A Flow-Based Method for Improving the Expansion or Conductance of Graph Cuts, 2004,
    https://doi.org/10.1007/978-3-540-25960-2_25
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from .._checks.numbers import positive_integer

_LARGEST_FLOW = 2**30  # scipy's capacities are int32


class _Split(NamedTuple):
    """A part in two: its blocks on either side, and the normalised cut between them."""

    cut: float
    one: np.ndarray
    other: np.ndarray


def mincut_labels(affinity: ArrayLike, parts: int = 2) -> np.ndarray:
    """Parts of a sequence, which need not be contiguous, by minimum cuts of the graph of blocks.

    Works on the host, with NumPy and SciPy: under ``jit`` use ``mincut_parts``, whose parts are
    contiguous. O(n^3) and one maximum flow per cut: a tenth of a second for 128 blocks.

    Args:
        affinity: floats (n, n), >= 0, known; it is symmetrised.
        parts: how many parts to make; at most n.

    Returns:
        int32 (n,), the part of each block, counted from 0 in the order in which they begin.

    Raises:
        ValueError: affinity is not (n, n), or has a negative or infinite entry or a NaN; parts is
            not in 1..n.
        TypeError: affinity is traced, or holds no floats; parts is no integer.
        ImportError: SciPy is missing, which the extra ``sparse`` has.

    Example:
        >>> affinity = np.kron([[1, 0, 1, 0], [0, 1, 0, 1]] * 2, np.ones((2, 2))) + 0.1
        >>> mincut_labels(affinity).tolist()
        [0, 0, 1, 1, 0, 0, 1, 1]
    """
    w = _checked(affinity)
    parts = positive_integer("parts", parts)
    if parts > len(w):
        raise ValueError(f"parts must be at most n = {len(w)}, the number of blocks; it is {parts}")
    whole, splits = [np.arange(len(w))], [_split(w, np.arange(len(w)))]
    while len(whole) < parts:
        best = int(np.argmin([split.cut for split in splits]))
        for blocks in (splits[best].one, splits[best].other):
            whole.append(blocks)
            splits.append(_split(w, blocks))
        del whole[best], splits[best]
    labels = np.zeros(len(w), np.int32)
    for label, blocks in enumerate(sorted(whole, key=min)):
        labels[blocks] = label
    return labels


def _checked(affinity: Any) -> np.ndarray:
    """affinity as a symmetric float64 array, or an error."""
    if isinstance(affinity, Tracer):
        raise TypeError(
            "affinity must be known: mincut_labels works on the host; it is traced. Under jit use "
            "mincut_parts"
        )
    x = np.asarray(affinity)
    if x.dtype.kind != "f" and x.dtype.name != "bfloat16":
        raise TypeError(f"affinity must be floats; its dtype is {x.dtype}")
    if x.ndim != 2 or x.shape[0] != x.shape[1] or x.size == 0:
        raise ValueError(f"affinity must be (n, n), n > 0; its shape is {x.shape}")
    x = x.astype(np.float64)
    if not (np.isfinite(x).all() and (x >= 0).all()):
        found = "one is negative" if (x < 0).any() else "one is not finite"
        raise ValueError(f"affinity must have finite entries >= 0; {found}")
    return (x + x.T) / 2


def _split(w: np.ndarray, blocks: np.ndarray) -> _Split:
    """The part of these blocks in two; one block cannot be cut."""
    if len(blocks) == 1:
        return _Split(np.inf, blocks, blocks[:0])
    part = w[np.ix_(blocks, blocks)]
    order = _spectral_order(part)
    seeds = max(1, len(blocks) // 4)
    side = minimum_cut(part, order[:seeds], order[-seeds:])
    across = part[side][:, ~side].sum()
    volumes = part[side].sum(), part[~side].sum()
    cut = sum(across / volume if volume > 0 else 0.0 for volume in volumes)
    return _Split(cut, blocks[side], blocks[~side])


def _spectral_order(w: np.ndarray) -> np.ndarray:
    """Blocks by their entry in the second eigenvector of the normalised affinity."""
    root = np.sqrt(np.maximum(w.sum(axis=1), np.finfo(np.float64).tiny))
    first = root / np.linalg.norm(root)
    # Without the first eigenvector, which is known, the second one is first.
    _, vectors = np.linalg.eigh(w / np.outer(root, root) - 2 * np.outer(first, first))
    return np.argsort(vectors[:, -1] / root, kind="stable")


def minimum_cut(w: np.ndarray, sources: np.ndarray, sinks: np.ndarray) -> np.ndarray:
    """Which nodes lie with the sources in a minimum cut of w (n, n) from the sinks: bool (n,).

    Affinities become integers, of which 2**30 are the sum of all; so the cut is that of w to
    n^2 / 2 parts in 2**30.
    """
    try:
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import breadth_first_order, maximum_flow
    except ImportError as error:
        raise ImportError(
            "mincut_labels needs SciPy: pip install -e '.[sparse]' in the checkout of flash_jax"
        ) from error
    n = len(w)
    capacity = np.zeros((n + 2, n + 2), np.int32)
    total = w.sum()
    capacity[:n, :n] = np.round(w * (_LARGEST_FLOW / total)) if total > 0 else 0
    np.fill_diagonal(capacity, 0)
    capacity[n, sources] = capacity[sinks, n + 1] = _LARGEST_FLOW
    graph = csr_array(capacity)
    left = csr_array(graph - maximum_flow(graph, n, n + 1).flow)
    left.eliminate_zeros()
    reached = breadth_first_order(left, n, return_predecessors=False)
    side = np.zeros(n + 2, bool)
    side[reached] = True
    return side[:n]
