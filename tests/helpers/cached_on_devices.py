"""Caches that lie on several devices, beside those on one: run by ``mesh_table.py``.

A program appends tokens and attends. It is compiled once, is looked at for what is gathered, and
runs on 4 devices. What is stored is compared with the cache on one device, and the output with the
list of tokens that a cache means (``cache_oracle``).
"""

import functools
import re

import jax
import numpy as np
from cache_oracle import Rows
from caches import grow
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from partitioned import compare

from flash_jax import KVCache, PagedKVCache, attend

B, S, K, N, H = 4, 64, 4, 8, 16
OF = {"batch": 0, "kv heads": 1, "keys": 2}  # the axis of keys (B, K, S, H) that is divided
KINDS = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "int8"},
    "window": {"window": 24},
}
# Differences that rounding explains: of sums, of the output, and of probabilities to 16 bits.
BOUNDS = {"float32": 2e-5, "window": 2e-5, "bfloat16": 2**-7, "int8": 2e-4}


@jax.jit
def step(cache, q, k, v):
    cache = cache.append(k, v)
    return attend(q, cache), cache


def tokens(rng, T):
    return tuple(rng.standard_normal((B, T, heads, H), np.float32) for heads in (N, K, K))


def placed(mesh, axis, cache, arrays):
    """The cache divided along an axis of its keys, and new tokens along it where they have it."""

    def put(x, spec):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    def of_cache(x):
        divided = axis == 0 or (axis < x.ndim and x.ndim > 2)
        return put(x, [None] * axis + ["x"] if divided else [])

    spec = {0: ["x"], 1: [None, None, "x"], 2: []}[axis]
    return jax.tree.map(of_cache, cache), [put(x, spec) for x in arrays]


def check(kind, divided, T):
    rng = np.random.default_rng(20180508)
    cache = KVCache.empty(B, S, K, H, **KINDS[kind])
    rows = Rows(B, S, H, cache.window)
    for count in (17, 14) if kind == "window" else (29,):  # more tokens than the window
        cache = grow(cache, rows, kind, *tokens(rng, count)[1:], [count, count, 11, 3])
    arrays = tokens(rng, T)
    grown = grow(cache, rows, kind, *arrays[1:], [T] * B)
    expected, _ = rows.attend(arrays[0])
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    cache, arrays = placed(mesh, OF[divided], cache, arrays)
    compiled = step.lower(cache, *arrays).compile()
    found, after = compiled(cache, *arrays)
    compare(found, expected, BOUNDS[kind])
    assert after.keys.sharding.is_equivalent_to(cache.keys.sharding, 4), after.keys.sharding
    np.testing.assert_array_equal(
        *(np.asarray(x.keys, np.float32) for x in (after, grown)), strict=True
    )
    # New tokens may be gathered, which are few, but nothing as long as the cache.
    for shape in re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", compiled.as_text()):
        assert np.prod([int(n) for n in shape.split(",")]) <= B * T * K * H, shape


def check_pages():
    rng = np.random.default_rng(20180508)
    cache = PagedKVCache.empty(B, 72, K, H, pages=40, page_size=8)
    rows, before, arrays = Rows(B, 72, H), tokens(rng, 29), tokens(rng, 1)
    cache = cache.append(*before[1:])
    for (_, key, value), count in ((before, 29), (arrays, 1)):
        rows.append(key, value, [count] * B)
    expected, _ = rows.attend(arrays[0])
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    cache, arrays = placed(mesh, 1, cache, arrays)
    compare(step(cache, *arrays)[0], expected, 1e-5)


def check_explicit(divided, cache):
    """Every method, with results that are sharded as the cache is."""
    rng = np.random.default_rng(20180508)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Explicit,))
    arrays, more, counts, order = tokens(rng, 7), tokens(rng, 1), [7, 3, 5, 7], [1, 1, 0, 3]

    def schedule(cache, arrays, more):
        cache = cache.append(*arrays[1:], counts).reorder(order).truncate(6).reset([2])
        return *step(cache, *more), cache.append(*more[1:])

    if cache.keys.dtype == np.int8:  # rounds what the formula does not
        expected, *_ = schedule(cache, arrays, more)
    else:
        rows = Rows(B, cache.slots, H)
        rows.append(*arrays[1:], counts)
        rows.reorder(order)
        rows.truncate([6, 6, 0, 6])
        rows.append(*more[1:], [1] * B)
        expected, _ = rows.attend(more[0])
    placed_cache, arrays = placed(mesh, OF[divided], cache, arrays)
    _, more = placed(mesh, OF[divided], cache, more)
    # Outside ``jit``, too, where rows may be counted.
    run = schedule if divided == "batch" else jax.jit(schedule)
    found, *after = run(placed_cache, arrays, more)
    compare(found, expected, 1e-5)
    for cache in after:
        for x, before in zip(*map(jax.tree.leaves, (cache, placed_cache)), strict=True):
            assert jax.typeof(x).sharding.spec == jax.typeof(before).sharding.spec
    found = after[0].to_arrays().key
    assert found.sharding.spec[0] == placed_cache.keys.sharding.spec[0]
    atol = 0.02 if cache.keys.dtype == np.int8 else 0
    np.testing.assert_allclose(*(np.asarray(x)[2, 0] for x in (found, more[1])), atol=atol)


# What is stored, what is divided and how many tokens are new; then of caches on an Explicit mesh.
CASES = (
    *(("float32", "batch", 1), ("int8", "kv heads", 1)),
    *(("window", "keys", 3), ("float32", "keys", 33)),
)
THOROUGH = (
    *(("float32", "kv heads", 1), ("float32", "keys", 1), ("int8", "batch", 1)),
    *(("int8", "keys", 1), ("bfloat16", "keys", 1)),
)
EXPLICIT = {"batch": "float32", "keys": "int8"}
THOROUGH_EXPLICIT = {"kv heads": "float32"}


def checks(thorough):
    for case in THOROUGH if thorough else CASES:
        yield f"cache: {case}", functools.partial(check, *case)
    for divided, kind in (THOROUGH_EXPLICIT if thorough else EXPLICIT).items():
        cache = KVCache.empty(B, S, K, H, **KINDS[kind])
        yield f"cache: explicit {divided}", functools.partial(check_explicit, divided, cache)
    if thorough:
        pages = PagedKVCache.empty(B, 72, K, H, pages=40, page_size=8)
        yield "cache: explicit pages", functools.partial(check_explicit, "kv heads", pages)
    else:
        yield "cache: pages", check_pages
